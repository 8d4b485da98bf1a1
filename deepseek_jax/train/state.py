"""The state of a run: what is kept between steps, and the trees of weights in it."""

from collections.abc import Callable
from typing import Any

import jax

from deepseek_jax.tree import dotted

State = dict  # {"params", "router_bias", "optimizer", "step", "skipped", "skipped_in_row"}


def check_like(name: str, given: dict, expected: dict) -> None:
    """Raises ValueError for the first array that is not of the shape and dtype expected at its path."""
    found, known = (
        {dotted(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in at}
        for at in map(jax.tree_util.tree_leaves_with_path, (given, expected))
    )
    for path in sorted({*found, *known}):
        if found.get(path) != known.get(path):
            raise ValueError(
                f"{name}.{path} is {found.get(path, 'missing')}: expected {known.get(path, 'no such weight')}."
            )


def map_weights(change: Callable[[dict], dict], state: State) -> State:
    """A state with `change` made to every tree in the form of its weights."""

    def changed(name: str, tree: Any) -> Any:
        if name in ("params", "router_bias"):
            return change(tree)
        if name == "optimizer":
            return {key: change(sub) if isinstance(sub, dict) else sub for key, sub in tree.items()}
        return tree

    return {name: changed(name, tree) for name, tree in state.items()}

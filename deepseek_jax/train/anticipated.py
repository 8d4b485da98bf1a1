"""Anticipatory routing: a step visits the experts that the weights of some steps before have chosen.

    experts of step t      by theta_(t-d), when its batch is read; d batches wait with the experts of their tokens
    all else of step t     by theta_t: the scores that weigh these experts, losses, gradients

Loads are those of the experts that are visited, so that router biases, which follow them, are d steps late as well.
So a weight that has gone astray does not at once change which experts learn from it. V4 switches this on after a spike
of the loss, from a checkpoint on, and off again later; the report puts its cost at a fifth of the time. Here it is a
forward pass per step. Multi-token prediction routes as it runs. No checkpoint holds the batches that wait: when a run
starts or resumes, the weights that it has then choose for its first d + 1 steps, so that with a delay a resumed run is
not the same to the last bit.
Paper: DeepSeek-V4, arXiv 2606.19348, the section on training stability.
"""

from collections import deque
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.data.pipeline import Batch
from deepseek_jax.layers.decoder import Routes
from deepseek_jax.train.loss import Losses, PreTraining, Totals, losses, tokens_of


class Routed(NamedTuple):
    """A `Batch` with the experts of its tokens."""

    ids_BT: jax.Array
    targets_BT: jax.Array
    segments_BT: jax.Array
    positions_BT: jax.Array
    weights_BT: jax.Array
    routes: Routes  # int16, by stack of layers


@dataclass(frozen=True)
class Anticipating(PreTraining):
    """The objective of the reports, of batches that are `Routed`."""

    def __call__(self, model: Any, batch: Any, over: Totals, step: jax.Array) -> tuple[jax.Array, Losses]:
        """See `Objective`."""
        found = losses(model, batch, over, chunk=self.chunk, mask=self.mask_documents, routes=batch.routes)
        return found.weighted(self._mtp_weight(step), self.auxiliary), found


def chosen(model: Any, batch: Batch, *, mask: bool) -> dict[str, jax.Array]:
    """Returns the experts that a model, whose blocks report them (`Execution.routes`), now chooses for a batch."""
    tokens = tokens_of(batch, mask=mask)
    _, statistics = model.run_blocks(model.begin(model.embed(tokens)), tokens)
    found = {name: layers.routes_BTK for name, layers in statistics.items() if layers.routes_BTK is not None}
    return {name: jnp.moveaxis(routes.reshape(-1, *routes.shape[-3:]), 0, 2) for name, routes in found.items()}


def ahead(batches: Generator[Batch], delay: int, routes_of: Callable[[Batch], Routes]) -> Generator[Routed]:
    """Yields batches `delay` steps after `routes_of`, by the weights of that time, has chosen their experts."""
    waiting: deque[Routed] = deque()
    try:
        for batch in batches:
            waiting.append(Routed(**batch._asdict(), routes=routes_of(batch)))
            if len(waiting) > delay:
                yield waiting.popleft()
        while waiting:
            yield waiting.popleft()
    finally:
        batches.close()

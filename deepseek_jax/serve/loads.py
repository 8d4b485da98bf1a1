"""How evenly the experts are loaded by what is served.

The ends of the latest sequences are read once more, without a cache, when somebody looks: routing depends on tokens and
weights alone, so these are the loads that serving them made. The programs that serve count nothing.
"""

import itertools
import json
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import unflatten_dict

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Tree, bind
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.serve.programs import Weights
from deepseek_jax.tree import Path as TreePath
from deepseek_jax.tree import paths

LENGTH = 256  # tokens of a sequence's end that are read
N_SEQUENCES = 8  # latest ones that are kept until somebody looks
BLOCKS = "_blocks"  # end of the names of stacks, which those of layers leave out
_WHAT_IS_READ = (
    'expected {"layers": [{"name": "moe 0", "load": [tokens of each expert]}, …]}. Run curl http://HOST:PORT/experts > '
    'FILE on a server of this model that has answered requests, with -H "Authorization: Bearer KEY" if it asks for one.'
)


class Running(Protocol):
    """What is needed of an engine."""

    programs: Any

    @property
    def weights(self) -> Weights:
        """Parameters and router biases."""


class Layer(NamedTuple):
    """A layer's name, the tokens that chose each of its experts, and where its weights are."""

    name: str
    load: list[int]
    stack: str  # names of the entries of a tree of weights, with dots: "moe_blocks", or "blocks_3.blocks.1" in a group

    @property
    def fullest(self) -> float:
        """The load of the fullest expert, as a multiple of the mean; 0 before any token."""
        return max(self.load) * len(self.load) / max(1, sum(self.load))


def read(path: str | Path) -> dict[str, Any]:
    """Returns the loads in a file, which /experts of a server answered: a tree of [L, E], as for `on_mesh.Redundant`.

    Raises UserError if the file is none.
    """
    try:
        stacks: dict[str, list[list[int]]] = {}
        for one in json.loads(Path(path).read_bytes())["layers"]:  # older servers name no stack
            stack = str(one["stack"] if "stack" in one else one["name"].rpartition(" ")[0] + BLOCKS)
            stacks.setdefault(stack, []).append(one["load"])
        counts = {tuple(name.split(".")): np.asarray(load_LE, np.float64) for name, load_LE in stacks.items()}
        tree = unflatten_dict(counts)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(f"loads of experts in {path}: {_WHAT_IS_READ} ({type(error).__name__}: {error})") from error
    if not counts or any(
        one.ndim != 2 or not np.isfinite(one).all() or one.min(initial=0) < 0 for one in counts.values()
    ):
        raise UserError(f"loads of experts in {path}: {_WHAT_IS_READ}")
    return tree


class ExpertLoads:
    """Loads since the start, of the sequences that were looked at."""

    def __init__(self, engine: Running):
        self._engine, self._lock = engine, threading.Lock()
        self._latest: deque[list[int]] = deque(maxlen=N_SEQUENCES)
        self._layers: list[Layer] = []
        self.counts: Tree = {}  # the same as a tree of [L, E], as `on_mesh.Redundant` takes them
        self._program = jax.jit(self._count)

    @property
    def layers(self) -> list[Layer]:
        """What was measured last."""
        return self._layers

    def note(self, ids: Sequence[int]) -> None:
        """Keeps a sequence that was served."""
        self._latest.append(list(ids[-LENGTH:]))

    def measure(self) -> list[Layer]:
        """Adds the sequences that were noted since the last time; returns the loads of each layer."""
        with self._lock:
            while self._latest:
                ids = self._latest.popleft()
                ids_BT = np.zeros((1, LENGTH), np.int32)
                ids_BT[0, : len(ids)] = ids
                found = self._program(self._engine.weights, ids_BT, np.int32(len(ids)))
                self._add(paths(jax.device_get(found)))
            return self._layers

    def _count(self, weights: Weights, ids_BT: jax.Array, n_tokens: jax.Array) -> Tree:
        """load_LE of each stack of blocks that has experts, of each block of a group."""
        programs = self._engine.programs
        real_BT = jnp.arange(ids_BT.shape[1])[None] < n_tokens
        with jax.default_matmul_precision(programs.matmul_precision):
            model: Any = bind(programs.definition, *weights)
            _, statistics = model.hidden(Tokens.of(ids_BT, real_BT=real_BT))
        return model.loads(statistics, [])

    def _add(self, found: dict[TreePath, np.ndarray]) -> None:
        before = paths(self.counts) if self.counts else {}
        counts = {path: load_LE + before.get(path, 0) for path, load_LE in found.items()}
        self.counts = unflatten_dict(counts)
        model: Any = bind(self._engine.programs.definition, *self._engine.weights)
        self._layers = [
            Layer(f"{name.removesuffix(BLOCKS)} {n}", counts[path][repeat].astype(int).tolist(), ".".join(path))
            for name, group in model.groups.items()
            for n, (repeat, path) in enumerate(itertools.product(range(_repeats(group, counts)), group))
            if path in counts
        ]


def _repeats(group: list[TreePath], counts: dict[TreePath, np.ndarray]) -> int:
    """How often a stack repeats the blocks of its group; 0 if none of them has experts."""
    return next((len(counts[path]) for path in group if path in counts), 0)

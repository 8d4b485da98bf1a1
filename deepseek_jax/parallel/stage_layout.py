"""Which layers lie where along the pipeline, and stacked weights laid out so that each rank holds its stages' layers.

A stack of L layers is `[L, ...]` in a checkpoint and on one device. In a pipeline it is `[ranks x chunks x slots,
...]`, split over the ranks: each stage has as many slots as the stage with most layers of that stack needs; a slot that
is left over repeats some layer and is never run. A rank holds one stage per chunk (`parallel.schedule`). The chunks of
a rank share the slots of a stack if at most one of them has layers of it, like the dense layers of V3, which are in
the first stage. DualPipe runs each stage on two ranks but stores it on one: in every step the weights go to the
opposite rank and gradients come back.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import PIPE
from deepseek_jax.parallel.schedule import Place, Schedule, make_schedule
from deepseek_jax.parallel.stages import divide, slices

Tree = dict
FOLDED = ("dualpipe", "dualpipev")  # a rank holds a stage and the one that lies opposite


@dataclass(frozen=True)
class StageLayout:
    """The stages of a pipeline on its ranks."""

    schedule: Schedule
    stages: tuple[dict[str, slice], ...]  # by number: the layers of each stack
    n_ranks: int

    @functools.cached_property
    def number(self) -> dict[Place, int]:
        """The stage that lies at each place."""
        return {place: number for lane in self.schedule.lanes for number, place in enumerate(lane)}

    @property
    def n_chunks(self) -> int:
        """Stages of a rank."""
        return 1 + max(chunk for _, chunk in self.number)

    @property
    def copies(self) -> int:
        """Copies of the model: one for each lane."""
        return len(self.schedule.lanes)

    @property
    def stored(self) -> int:
        """Stages of a rank whose weights it stores."""
        return self.n_chunks // self.copies

    @functools.cached_property
    def stored_chunks(self) -> np.ndarray:
        """The chunks whose weights a rank stores, [ranks, stored]; of two copies of a stage, the first lane's."""
        first = sorted(self.schedule.lanes[0])
        return np.array([chunk for _, chunk in first]).reshape(self.n_ranks, self.stored)

    def kind(self, place: Place) -> tuple[bool, tuple[tuple[str, int], ...]]:
        """What a stage runs: (whether it is the last, layers of each stack)."""
        number = self.number[place]
        layers = tuple((name, part.stop - part.start) for name, part in self.stages[number].items())
        return number == len(self.stages) - 1, layers

    def slots(self, stack: str) -> int:
        """Layers of a stack in the stage that holds most."""
        return max(part[stack].stop - part[stack].start if stack in part else 0 for part in self.stages)

    def layers(self, stack: str) -> np.ndarray:
        """Number of the layer in each slot, [ranks, chunks, slots], int32; -1 where a slot is left over."""
        found = np.full((self.n_ranks, self.n_chunks, self.slots(stack)), -1, np.int32)
        for (rank, chunk), number in self.number.items():
            part = self.stages[number].get(stack, slice(0, 0))
            found[rank, chunk, : part.stop - part.start] = range(part.start, part.stop)
        return found

    def is_shared(self, stack: str) -> bool:
        """Whether the chunks of a rank share the slots of a stack: no rank has layers of it in two of them."""
        return bool(((self.layers(stack) >= 0).any(axis=2).sum(axis=1) <= 1).all())

    def stored_layers(self, stack: str) -> np.ndarray:
        """Number of the layer in each slot of the stages that a rank stores, [ranks, stored, slots], int32; or -1.

        Of slots that chunks share there is one set, as if a rank stored one stage.
        """
        found = np.take_along_axis(self.layers(stack), self.stored_chunks[:, :, None], axis=1)
        return found.max(axis=1, keepdims=True) if self.is_shared(stack) else found

    def staged(self, tree: Tree) -> Tree:
        """Weights `[L, ...]` of stacks as `[ranks x stored x slots, ...]`; all others as they are."""
        return self._stacks(tree, lambda name: np.maximum(self.stored_layers(name), 0).ravel())

    def unstaged(self, tree: Tree) -> Tree:
        """The inverse of `staged`."""

        def slot_of_layer(name: str) -> np.ndarray:
            layers = self.stored_layers(name).ravel()
            return np.argsort(np.where(layers < 0, layers.size, layers), kind="stable")[: self.n_layers(name)]

        return self._stacks(tree, slot_of_layer)

    def own_layers(self, tree: Tree) -> Tree:
        """What belongs to the layers of this rank's slots, of `[L, ...]` for all layers; inside `per_device` only."""
        rank = jax.lax.axis_index(PIPE)

        def index(name: str) -> jax.Array:
            numbers = np.maximum(self.stored_layers(name), 0).reshape(self.n_ranks, -1)
            return jnp.asarray(numbers)[rank]

        return self._stacks(tree, index)

    def fetch(self, stack: str) -> tuple[int, Callable[[Tree, jax.Array], Tree]]:
        """Returns (layers of a stack, a function that gathers one of them).

        The function takes this rank's weights of the stack and the number of a layer, and returns that layer's weights,
        which the rank that holds them sends to all others; inside `per_device` only.
        """
        slots = self.stored_layers(stack).reshape(self.n_ranks, -1)
        n_layers = self.n_layers(stack)
        ranks, places = np.array([np.argwhere(slots == layer)[0] for layer in range(n_layers)]).T

        def gather(weights: Tree, layer: jax.Array) -> Tree:
            is_here = jnp.asarray(ranks)[layer] == jax.lax.axis_index(PIPE)
            own = jax.tree.map(lambda a: jax.lax.dynamic_index_in_dim(a, jnp.asarray(places)[layer], 0, False), weights)
            return jax.tree.map(lambda a: jax.lax.psum(jnp.where(is_here, a, 0), PIPE), own)

        return n_layers, gather

    @property
    def _mirror(self) -> list[tuple[int, int]]:
        """The pairs of ranks that hold each other's stages, where there are two copies of the model."""
        return [(rank, self.n_ranks - 1 - rank) for rank in range(self.n_ranks)]

    def _stores(self, chunk: int) -> jax.Array:
        """Whether this rank stores the weights of a chunk, where it stores one of two; inside `per_device` only."""
        return jnp.asarray(self.stored_chunks[:, 0] == chunk)[jax.lax.axis_index(PIPE)]

    def _stores_some(self, stack: str) -> jax.Array:
        """Whether this rank stores layers of a stack; inside `per_device` only."""
        return jnp.asarray((self.stored_layers(stack) >= 0).any(axis=(1, 2)))[jax.lax.axis_index(PIPE)]

    def chunks(self, tree: Tree) -> list[Tree]:
        """The weights of each stage of this rank, from those that it stores; inside `per_device` only.

        Those of DualPipe's second copy come from the opposite rank.
        """

        def divided(name: str, a: jax.Array) -> list[jax.Array]:
            if self.copies == 1:
                return [a] * self.n_chunks if self.is_shared(name) else jnp.split(a, self.n_chunks)
            opposite = jax.lax.ppermute(a, PIPE, self._mirror)
            if self.is_shared(name):
                return [jnp.where(self._stores_some(name), a, opposite)] * self.n_chunks
            return [jnp.where(self._stores(chunk), a, opposite) for chunk in range(self.n_chunks)]

        def of(chunk: int, name: str) -> Any:
            is_divided = self._is_stack(name)
            return jax.tree.map(lambda a: a[chunk], parts[name], is_leaf=_is_list) if is_divided else tree[name]

        parts = {
            name: jax.tree.map(functools.partial(divided, name), sub)
            for name, sub in tree.items()
            if self._is_stack(name)
        }
        return [{name: of(chunk, name) for name in tree} for chunk in range(self.n_chunks)]

    def apart(self, tree: Tree) -> Tree:
        """Weights of a stage with those of each slot of a stack apart: {stack: {number of the slot: its weights}}."""

        def layers(sub: Tree) -> Tree:
            n_slots = len(jax.tree.leaves(sub)[0]) if jax.tree.leaves(sub) else 0
            return {str(slot): jax.tree.map(lambda a, slot=slot: a[slot], sub) for slot in range(n_slots)}

        return {name: layers(sub) if self._is_stack(name) else sub for name, sub in tree.items()}

    def together(self, tree: Tree) -> Tree:
        """The inverse of `apart`."""

        def stack(slots: Tree) -> Tree:
            in_order = [slots[str(slot)] for slot in range(len(slots))]
            return jax.tree.map(lambda *a: jnp.stack(a), *in_order) if slots else {}

        return {name: stack(sub) if self._is_stack(name) else sub for name, sub in tree.items()}

    def joined(self, chunks: Sequence[Tree]) -> Tree:
        """Gradients in the layout of the weights: the transpose of `chunks`; inside `per_device` only.

        Those of what chunks share are added up: no rank has a stage with it in two.
        """

        def joined(*parts: jax.Array) -> jax.Array:
            if self.copies == 1:
                return jnp.concatenate(parts)
            own, other = (jnp.where(self._stores(chunk), *parts) for chunk in range(self.n_chunks))
            return own + jax.lax.ppermute(other, PIPE, self._mirror)

        def returned(name: str, a: jax.Array) -> jax.Array:
            if self.copies == 1 or not self._is_stack(name):
                return a
            is_own = self._stores_some(name)
            return jnp.where(is_own, a, 0) + jax.lax.ppermute(jnp.where(is_own, 0, a), PIPE, self._mirror)

        def of(name: str) -> Any:
            is_apart = self._is_stack(name) and not self.is_shared(name)
            change = joined if is_apart else lambda *parts: returned(name, sum(parts[1:], parts[0]))
            return jax.tree.map(change, *(chunk[name] for chunk in chunks))

        return {name: of(name) for name in chunks[0]}

    def of_all_layers(self, chunks: Sequence[Tree]) -> Tree:
        """This rank's share of what belongs to layers, `[L, ...]`, from that of the slots of its stages.

        The sum over all ranks is that of all layers; inside `per_device` only.
        """
        rank = jax.lax.axis_index(PIPE)

        def placed(name: str, *parts: jax.Array) -> jax.Array:
            numbers = self.layers(name).reshape(self.n_ranks, -1)
            layers = jnp.asarray(np.where(numbers < 0, self.n_layers(name), numbers))[rank]
            slots = jnp.concatenate(parts)
            return jnp.zeros((self.n_layers(name), *slots.shape[1:]), slots.dtype).at[layers].add(slots, mode="drop")

        def of(name: str) -> Any:
            change = (
                functools.partial(placed, name) if self._is_stack(name) else lambda *parts: sum(parts[1:], parts[0])
            )
            return jax.tree.map(change, *(chunk[name] for chunk in chunks))

        return {name: of(name) for name in chunks[0]}

    def _is_stack(self, name: str) -> bool:
        return any(name in stage for stage in self.stages)

    def n_layers(self, stack: str) -> int:
        """Layers of a stack over all stages."""
        return max(part[stack].stop for part in self.stages if stack in part)

    def _stacks(self, tree: Tree, index: Callable[[str], Any]) -> Tree:
        return {
            name: jax.tree.map(functools.partial(jnp.take, indices=index(name), axis=0), sub)
            if self._is_stack(name)
            else sub
            for name, sub in tree.items()
        }


def _is_list(x: object) -> bool:
    return isinstance(x, list)


def make_layout(
    name: str, n_ranks: int, micro_batches: int, stacks: Mapping[str, int], end: float = 0.0, put_off: int = -1
) -> StageLayout:
    """Returns the layout of a pipeline.

    Args:
        name: of the schedule.
        n_ranks: devices along the pipeline.
        micro_batches: of a step, on each device.
        stacks: name -> number of layers, in the order of running.
        end: work of the last stage besides its layers, in layers.
        put_off: for `parallel.schedule.bounded`.

    Raises:
        UserError: the schedule does not suit the ranks, the micro-batches or the number of layers.
    """
    check_schedule(name, n_ranks, micro_batches)
    n_stages, n_layers = n_ranks * (2 if name == "dualpipev" else 1), sum(stacks.values())
    if n_stages > n_layers:
        raise UserError(
            f"config.mesh.pipe={n_ranks} with config.pipeline.schedule={name}: {n_stages} stages for {n_layers} "
            f"layers. Choose a config.mesh.pipe of at most {n_layers * n_ranks // n_stages}."
        )
    layers = divide(n_layers, n_stages, end, name in FOLDED)
    schedule = make_schedule(name, n_ranks, micro_batches, put_off)
    return StageLayout(schedule, slices(stacks, layers), n_ranks)


def check_schedule(name: str, n_ranks: int, micro_batches: int) -> None:
    """Raises UserError if a schedule does not suit the devices along the pipeline or the micro-batches."""
    given = f"config.pipeline.schedule={name} with config.mesh.pipe={n_ranks}"
    if name == "dualpipe" and n_ranks % 2:
        raise UserError(f"{given}: expected an even number of devices. Choose an even one, or another schedule.")
    least = 2 * n_ranks if name in FOLDED else 1
    even = name == "dualpipe"
    if micro_batches < least or (even and micro_batches % 2):
        expected = f"an even number >= {least}" if even else f"{least} or more"
        raise UserError(
            f"{given} and config.pipeline.micro_batches={micro_batches}: expected {expected} micro-batches. "
            "Choose another number, or config.pipeline.schedule=1f1b."
        )

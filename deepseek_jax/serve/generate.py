"""One batch of prompts that begin and end together, over one cache: what `bench generate` measures on a GPU.

The engine (`engine`) does all other generation. This is the same layers and kernels with no pages, no scheduler, and
all prompts in one pass.

    prefill   prompts of a batch, padded at the end to one length, in the expanded form; fills the cache
    decode    one token per sequence in the absorbed form; the cache is donated, so that it is updated in place

Sequences of different lengths share a batch: each has its own positions and attends to the slots up to them, and cached
padding is overwritten before it can be attended to. Prompts and caches are padded to powers of two, so that few
programs are compiled; long prompts are read in chunks, so that memory grows with their length and not faster.

Tokens are drawn, and stop ids recognised, on the device, `BLOCK` steps per program. The host dispatches the next
program before it looks at the tokens of the last one.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.typing import ArrayLike

from deepseek_jax.layers.base import Tree, bind
from deepseek_jax.serve.sampler import sample

ENDED = -1  # in place of tokens after the end of a sequence
SMALLEST = 32  # least length of prompts and caches
CHUNK = 2048  # longest part of a prompt that is read in one pass
PAGE = 64  # slots of a cache that a kernel reads at a time
BLOCK = 32  # decode steps of one program that looks at no token in between

Weights = tuple[Tree, Tree]  # parameters and router biases


class Drawing(NamedTuple):
    """How tokens are drawn; see `sampler.sample`."""

    key_B: jax.Array
    temperature: ArrayLike | None


class State(NamedTuple):
    """The sequences between two steps, all of it on the device."""

    id_B: jax.Array  # the last token, drawn and not yet in the cache
    position_B: jax.Array  # its position
    is_running_B: jax.Array  # False after a stop id
    cache: Tree


def bucket(n_tokens: int, largest: int) -> int:
    """Returns `n_tokens` rounded up to a power of two, at least `SMALLEST` and at most `largest`.

    A largest number of more than a page is rounded up to whole pages, in which kernels read a cache.
    """
    most = largest if largest <= PAGE else -(-largest // PAGE) * PAGE
    return min(max(SMALLEST, 1 << (n_tokens - 1).bit_length()), most)


class Generator:
    """The compiled programs that generate with one model.

    `definition` is that of a model with `prefill`, `extend` and `decode` (`layers.base.split`). Longer prompts than
    `chunk` are read in parts of so many tokens; `block` is the number of decode steps in one program;
    `compiler_options` as for `jax.jit`. With `ends_early` a program of decode steps ends with the last sequence,
    otherwise it has `block` steps, so that the host of a GPU need not read a condition in each of them.
    """

    def __init__(
        self,
        definition: nnx.GraphDef,
        *,
        chunk: int = CHUNK,
        block: int = BLOCK,
        compiler_options: dict[str, str | bool] | None = None,
        ends_early: bool = True,
    ):
        self.definition, self.chunk, self.block, self._ends_early = definition, chunk, block, ends_early
        jit = functools.partial(jax.jit, donate_argnames="state", compiler_options=compiler_options)
        self._read = jit(self._read_and_draw, static_argnames="n_slots")
        self._decode_block = jit(self._decode_steps)

    def generate(
        self,
        params: Tree,
        router_bias: Tree,
        prompts: Sequence[np.ndarray],
        key_B: jax.Array,
        *,
        max_new_tokens: int,
        n_positions: int,
        temperature: float = 0.0,
        stop_ids: Sequence[int] = (),
    ) -> np.ndarray:
        """Continues each prompt to its end, `block` steps per program.

        Args:
            params, router_bias: the model's weights.
            prompts: token ids, of any lengths.
            key_B: one random key per prompt (`sampler.row_keys`).
            max_new_tokens: largest number of steps.
            n_positions: largest number of tokens per sequence, prompt included.
            temperature: see `sampler.sample`.
            stop_ids: ids that end a sequence.

        Returns new ids_BT, int32: a sequence ends with its stop id and is `ENDED` after it.
        """
        drawing = Drawing(key_B, np.float32(temperature) if temperature > 0 else None)
        parts = list(self._parts((params, router_bias), prompts, drawing, max_new_tokens, n_positions, stop_ids))
        new_BT = np.concatenate(parts, axis=1)
        return new_BT[:, : max(1, int((new_BT != ENDED).any(axis=0).sum()))]

    def _parts(
        self,
        weights: Weights,
        prompts: Sequence[np.ndarray],
        drawing: Drawing,
        max_new_tokens: int,
        n_positions: int,
        stop_ids: Sequence[int],
    ) -> Iterator[np.ndarray]:
        """Yields the new ids_BT, those of one program at a time: after the first token up to `block` steps."""
        ends = _padded(stop_ids)
        n_slots = bucket(max(map(len, prompts)) + max_new_tokens, n_positions)
        new_BT, state = self._prefill(weights, prompts, drawing, ends, n_slots)
        is_running_B = np.ones(len(prompts), bool)
        n_dispatched = 1
        while True:
            ahead_BT, n_steps = None, min(self.block, max_new_tokens - n_dispatched)
            if n_steps:
                ahead_BT, state = self._decode_block(weights, state, drawing, ends, np.int32(n_steps))
            n_dispatched += n_steps
            shown_BT = np.asarray(new_BT)
            is_running_B &= ~np.isin(shown_BT, (ENDED, *stop_ids)).any(axis=1)
            yield shown_BT
            if ahead_BT is None or not is_running_B.any():
                return
            new_BT = ahead_BT

    def _prefill(
        self, weights: Weights, prompts: Sequence[np.ndarray], drawing: Drawing, stop_ids: np.ndarray, n_slots: int
    ) -> tuple[jax.Array, State]:
        """Reads the prompts, in chunks if they are long, and draws the first token of each: (new ids_BT, state)."""
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        longest = int(lengths_B.max())
        n_read = bucket(longest, n_slots) if longest <= self.chunk else self.chunk
        ids_BT = np.zeros((len(prompts), -(-longest // n_read) * n_read), np.int32)
        for row, prompt in zip(ids_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        state = None
        for start in range(0, longest, n_read):
            part_BT = ids_BT[:, start : start + n_read]
            state = self._read(weights, part_BT, np.int32(start), lengths_B, state, drawing, stop_ids, n_slots=n_slots)
        assert state is not None
        return state.id_B[:, None], state

    def _read_and_draw(
        self,
        weights: Weights,
        ids_BT: jax.Array,
        start: jax.Array,
        lengths_B: jax.Array,
        state: State | None,
        drawing: Drawing,
        stop_ids: jax.Array,
        n_slots: int,
    ) -> State:
        """Reads a part of the prompts from position `start` on; draws the first token of those that end in it."""
        real_BT = start + jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]
        model: Any = bind(self.definition, *weights)
        if state is None:
            h_BTD, cache = model.prefill(ids_BT, n_slots, real_BT)
        else:
            h_BTD, cache = model.extend(ids_BT, start, state.cache, real_BT)
        last_B = jnp.clip(lengths_B - 1 - start, 0, ids_BT.shape[1] - 1)
        logits_BV = model.head(jnp.take_along_axis(h_BTD, last_B[:, None, None], axis=1))[:, 0]
        id_B = _draw(logits_BV, lengths_B, drawing)
        if state is not None:
            id_B = jnp.where(lengths_B > start, id_B, state.id_B)  # a prompt that ended before has its token
        return State(id_B, lengths_B, ~_is_in(id_B, stop_ids), cache)

    def _decode_and_draw(
        self, weights: Weights, state: State, drawing: Drawing, stop_ids: jax.Array
    ) -> tuple[jax.Array, State]:
        """One step: (new ids_BT with T = 1, state); sequences that have ended compute something unused."""
        id_B, position_B, is_running_B, cache = state
        model: Any = bind(self.definition, *weights)
        logits_BTV, cache = model.decode(id_B[:, None], position_B[:, None], cache)
        position_B = position_B + 1
        id_B = _draw(logits_BTV[:, 0], position_B, drawing)
        shown_B = jnp.where(is_running_B, id_B, ENDED)
        return shown_B[:, None], State(id_B, position_B, is_running_B & ~_is_in(id_B, stop_ids), cache)

    def _decode_steps(
        self, weights: Weights, state: State, drawing: Drawing, stop_ids: jax.Array, n_steps: jax.Array
    ) -> tuple[jax.Array, State]:
        """Up to `n_steps` steps, fewer if all sequences end: (new ids_BT with T = `block`, state).

        Steps beyond these, of a program that does not end early, are computed for nothing.
        """

        def is_unfinished(carry: tuple) -> jax.Array:
            step, _, state = carry
            return (step < n_steps) & jnp.any(state.is_running_B)

        def advance(carry: tuple) -> tuple:
            step, new_BT, state = carry
            if not self._ends_early:
                state = state._replace(is_running_B=state.is_running_B & (step < n_steps))
            shown_BT, state = self._decode_and_draw(weights, state, drawing, stop_ids)
            return step + 1, lax.dynamic_update_slice(new_BT, shown_BT, (0, step)), state

        new_BT = jnp.full((*state.id_B.shape, self.block), ENDED, jnp.int32)
        carry = jnp.int32(0), new_BT, state
        if self._ends_early:
            _, new_BT, state = lax.while_loop(is_unfinished, advance, carry)
        else:
            _, new_BT, state = lax.fori_loop(0, self.block, lambda _, carry: advance(carry), carry)
        return new_BT, state


def _draw(logits_BV: jax.Array, position_B: jax.Array, drawing: Drawing) -> jax.Array:
    """Returns the tokens for `position_B`: a sequence's key and the position determine the sample."""
    return sample(logits_BV, jax.vmap(jax.random.fold_in)(drawing.key_B, position_B), drawing.temperature)


def _padded(stop_ids: Sequence[int]) -> np.ndarray:
    """Returns stop ids as an array of one of few lengths, filled up with a number that no token has."""
    return np.pad(np.asarray(stop_ids, np.int32), (0, -len(stop_ids) % 8), constant_values=ENDED)


def _is_in(id_B: jax.Array, stop_ids: jax.Array) -> jax.Array:
    return jnp.any(id_B[:, None] == stop_ids, axis=1)

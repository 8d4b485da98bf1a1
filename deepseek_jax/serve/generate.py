"""Generation over the latent cache: the prompts in one pass, then one token per sequence and step.

    prefill   prompts of a batch, padded at the end to one length, in the expanded form; fills the cache
    decode    one token per sequence in the absorbed form; the cache is donated, so that it is updated in place

Sequences of different lengths share a batch: each has its own positions and attends to the slots up to them, and cached
padding is overwritten before it can be attended to. Prompts and caches are padded to powers of two, so that few
programs are compiled.
"""

import operator
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import ArrayLike

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Tree, bind
from deepseek_jax.serve.sampler import sample

ENDED = -1  # in place of tokens after the end of a sequence
SMALLEST = 32  # least length of prompts and caches

Weights = tuple[Tree, Tree]  # parameters and router biases
Drawing = tuple[jax.Array, ArrayLike, ArrayLike]  # keys of the rows, temperature, top_p


def bucket(n_tokens: int, largest: int) -> int:
    """Returns `n_tokens` rounded up to a power of two, at least `SMALLEST` and at most `largest`."""
    return min(max(SMALLEST, 1 << (n_tokens - 1).bit_length()), largest)


class Generator:
    """The compiled programs that generate with one model.

    `definition` is that of a model with `prefill` and `decode` (`layers.base.split`); `matmul_precision` is that of
    float32 matmuls, as for `jax.default_matmul_precision`, None for the device's default.
    """

    def __init__(self, definition: nnx.GraphDef, vocab_size: int, matmul_precision: str | None = None):
        self.definition, self.vocab_size, self.matmul_precision = definition, vocab_size, matmul_precision
        self._prefill = jax.jit(self._prefill_and_draw, static_argnames="n_slots")
        self._decode = jax.jit(self._decode_and_draw, donate_argnames="cache")

    def stream(
        self,
        params: Tree,
        router_bias: Tree,
        prompts: Sequence[Sequence[int]],
        key_B: jax.Array,
        *,
        max_new_tokens: int,
        n_positions: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop_ids: Sequence[int] = (),
    ) -> Iterator[np.ndarray]:
        """Continues each prompt; the next step already runs while the caller handles the last one's tokens.

        Args:
            params, router_bias: the model's weights.
            prompts: token ids, of any lengths.
            key_B: one random key per prompt (`sampler.row_keys`).
            max_new_tokens: largest number of steps.
            n_positions: largest number of tokens per sequence, prompt included.
            temperature, top_p: see `sampler.sample`.
            stop_ids: ids that end a sequence.

        Returns an iterator over the new ids_B of each step, int32; a sequence ends with its stop id and is `ENDED`
        after it. The iterator stops when all sequences have ended.

        Raises UserError: a prompt is empty, an id is unknown, there are more tokens than positions, or a number is out
        of range.
        """
        rows = [_as_ids(prompt) for prompt in prompts]
        max_new_tokens = _count(max_new_tokens)
        _check_drawing(temperature, top_p)
        self._check(rows, max_new_tokens, n_positions)
        drawing = (key_B, np.float32(temperature), np.float32(top_p))
        return self._steps((params, router_bias), rows, drawing, max_new_tokens, n_positions, np.asarray(stop_ids))

    def _steps(
        self,
        weights: Weights,
        prompts: list[np.ndarray],
        drawing: Drawing,
        max_new_tokens: int,
        n_positions: int,
        stop_ids: np.ndarray,
    ) -> Iterator[np.ndarray]:
        lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
        longest = int(lengths_B.max())
        ids_BT = np.zeros((len(prompts), bucket(longest, n_positions)), np.int32)
        for row, prompt in zip(ids_BT, prompts, strict=True):
            row[: len(prompt)] = prompt
        n_slots = bucket(longest + max_new_tokens, n_positions)
        drawn_B, cache = self._prefill(weights, ids_BT, lengths_B, drawing, n_slots=n_slots)
        running_B = np.ones(len(prompts), bool)
        for step in range(max_new_tokens):
            new_B = np.where(running_B, np.asarray(drawn_B), ENDED)
            running_B &= ~np.isin(new_B, stop_ids)
            is_last = step + 1 == max_new_tokens or not running_B.any()
            if not is_last:
                drawn_B, cache = self._decode(weights, drawn_B, lengths_B + step, cache, drawing)
            yield new_B
            if is_last:
                return

    def _prefill_and_draw(
        self, weights: Weights, ids_BT: jax.Array, lengths_B: jax.Array, drawing: Drawing, n_slots: int
    ) -> tuple[jax.Array, Tree]:
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self.definition, *weights)
            real_BT = jnp.arange(ids_BT.shape[1]) < lengths_B[:, None]
            h_BTD, cache = model.prefill(ids_BT, n_slots, real_BT)
            last_BTD = jnp.take_along_axis(h_BTD, (lengths_B - 1)[:, None, None], axis=1)
            logits_BV = model.head(last_BTD)[:, 0]
        return _draw(logits_BV, lengths_B, *drawing), cache

    def _decode_and_draw(
        self, weights: Weights, ids_B: jax.Array, positions_B: jax.Array, cache: Tree, drawing: Drawing
    ) -> tuple[jax.Array, Tree]:
        with jax.default_matmul_precision(self.matmul_precision):
            model: Any = bind(self.definition, *weights)
            logits_BTV, cache = model.decode(ids_B[:, None], positions_B[:, None], cache)
        return _draw(logits_BTV[:, 0], positions_B + 1, *drawing), cache

    def _check(self, prompts: list[np.ndarray], max_new_tokens: int, n_positions: int) -> None:
        if not prompts or not all(prompt.ndim == 1 and len(prompt) for prompt in prompts):
            raise UserError("a prompt is empty: expected one token or more.")
        for prompt in prompts:
            if prompt.min() < 0 or prompt.max() >= self.vocab_size:
                ids = f"ids from {prompt.min()} to {prompt.max()}"
                raise UserError(f"a prompt with {ids}: expected 0 to {self.vocab_size - 1}.")
        longest = max(map(len, prompts))
        if longest >= n_positions:
            raise UserError(
                f"a prompt of {longest} tokens fills the {n_positions} positions that the model was trained on. "
                f"Give the end of the text alone (the last {n_positions // 2} tokens), or raise n_positions."
            )
        if longest + max_new_tokens > n_positions:
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {n_positions} positions that "
                f"the model was trained on. Ask for {n_positions - longest} or fewer, or raise n_positions."
            )


def _as_ids(prompt: Sequence[int]) -> np.ndarray:
    """Returns a prompt as int32. Raises UserError for fractions, which are not truncated."""
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of different lengths inside
        ids = np.zeros((0, 0))
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"a prompt is {str(prompt)[:60]}: expected a list of ids, which are whole numbers.")
    if ids.size and (ids.min() < np.iinfo(np.int32).min or ids.max() > np.iinfo(np.int32).max):
        raise UserError(f"a prompt with ids from {ids.min()} to {ids.max()}: expected ids of the vocabulary.")
    return ids.astype(np.int32)


def _count(max_new_tokens: int) -> int:
    try:
        count = operator.index(max_new_tokens)
    except TypeError:
        count = 0
    if count < 1:
        raise UserError(f"max_new_tokens={max_new_tokens!r}: expected a whole number, 1 or more.")
    return count


def _check_drawing(temperature: float, top_p: float) -> None:
    try:
        is_valid = 0 <= float(temperature) < np.inf and 0 <= float(top_p) <= 1
    except (TypeError, ValueError):
        is_valid = False
    if not is_valid:
        raise UserError(
            f"temperature={temperature!r}, top_p={top_p!r}: expected temperature >= 0 and top_p from 0 to 1."
        )


def _draw(
    logits_BV: jax.Array, positions_B: jax.Array, key_B: jax.Array, temperature: ArrayLike, top_p: ArrayLike
) -> jax.Array:
    """Returns the tokens for `positions_B`: a sequence's key and the position determine the sample."""
    return sample(logits_BV, jax.vmap(jax.random.fold_in)(key_B, positions_B), temperature, top_p)

"""Rollouts: answers to a batch of prompts as one program, drawn with the weights that are being trained.

    prefill   all prompts, padded at the end to one length
    decode    one token per answer and turn of a loop, until all have ended or are as long as allowed

A draw depends on the key of its row, the position and the weights alone, as in `serve.generate`, so rows do not depend
on their neighbours. Each token keeps the log-probability with which it was drawn: at the temperature of the draw, over
the whole vocabulary. On several devices each has its rows, and the loop turns until all devices have ended: experts are
spread over devices, which wait for one another in every layer.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.pipeline import Array
from deepseek_jax.parallel.mesh import total
from deepseek_jax.seeds import random_key
from deepseek_jax.serve.sampler import sample


class Prompts(NamedTuple):
    """Prompts of a batch; every array has rows first."""

    ids_BT: Array  # int32, padded at the end
    length_B1: Array  # their tokens, int32
    key_BK: Array  # the data of a random key per row, uint32
    temperature_B1: Array  # float32; 0 draws the likeliest token


class Rollouts(NamedTuple):
    """Prompts with their answers; every array has rows first."""

    ids_BT: Array  # prompt, answer, padding; int32
    logp_BT: Array  # log-probability of each drawn token, at its own column; 0 elsewhere
    n_drawn_B1: Array  # tokens of the answer, its end mark included; int32
    is_finished_B1: Array  # whether it ended with an end mark, bool


def pad(prompts: Sequence[np.ndarray], n_tokens: int, keys: np.ndarray, temperature: float) -> Prompts:
    """Returns prompts of any lengths up to `n_tokens` as arrays; `keys` are those of `row_keys`."""
    ids_BT = np.zeros((len(prompts), n_tokens), np.int32)
    for row, prompt in zip(ids_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([[len(prompt)] for prompt in prompts], np.int32)
    return Prompts(ids_BT, lengths, keys, np.full((len(prompts), 1), temperature, np.float32))


def row_keys(seed: int, step: int, n_rows: int) -> np.ndarray:
    """Returns key_BK: the data of one key per row, a function of (seed, step, row) alone."""
    key = jax.random.fold_in(random_key(seed), step)
    keys = jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(n_rows))
    return np.asarray(jax.random.key_data(keys))


def roller(n_new: int, stop_ids: Sequence[int]) -> Callable[[Any, Prompts], Rollouts]:
    """Returns `rollout(model, prompts)`, which draws up to `n_new` tokens; inside `per_device` only."""
    ends = np.asarray(stop_ids, np.int32)

    def rollout(model: Any, prompts: Prompts) -> Rollouts:
        (n_rows, n_prompt), length_B = prompts.ids_BT.shape, prompts.length_B1[:, 0]
        key_B, rows = jax.random.wrap_key_data(prompts.key_BK), jnp.arange(n_rows)
        real_BT = jnp.arange(n_prompt) < length_B[:, None]
        h_BTD, cache = model.prefill(prompts.ids_BT, n_prompt + n_new, real_BT)
        logits_BV = model.head(jnp.take_along_axis(h_BTD, (length_B - 1)[:, None, None], axis=1))[:, 0]

        def is_unfinished(carry: tuple) -> jax.Array:
            return (carry[0] < n_new) & (total(jnp.any(carry[1]).astype(jnp.int32)) > 0)

        def advance(carry: tuple) -> tuple:
            n, going_B, logits_BV, cache, ids_BT, logp_BT, n_drawn_B = carry
            at_B = length_B + n
            id_B, logp_B = draw(logits_BV, key_B, at_B, prompts.temperature_B1[:, 0])
            ids_BT = ids_BT.at[rows, at_B].set(jnp.where(going_B, id_B, ids_BT[rows, at_B]))
            logp_BT = logp_BT.at[rows, at_B].set(jnp.where(going_B, logp_B, 0.0))
            logits_BTV, cache = model.decode(id_B[:, None], at_B[:, None], cache)
            n_drawn_B, going_B = n_drawn_B + going_B, going_B & ~jnp.isin(id_B, ends)
            return n + 1, going_B, logits_BTV[:, 0], cache, ids_BT, logp_BT, n_drawn_B

        ids_BT = jnp.zeros((n_rows, n_prompt + n_new), jnp.int32).at[:, :n_prompt].set(prompts.ids_BT)
        zeros_BT, zeros_B = jnp.zeros(ids_BT.shape, jnp.float32), jnp.zeros(n_rows, jnp.int32)
        begin = (jnp.int32(0), jnp.ones(n_rows, bool), logits_BV, cache, ids_BT, zeros_BT, zeros_B)
        _, going_B, _, _, ids_BT, logp_BT, n_drawn_B = jax.lax.while_loop(is_unfinished, advance, begin)
        return Rollouts(ids_BT, logp_BT, n_drawn_B[:, None], ~going_B[:, None])

    return rollout


def draw(
    logits_BV: jax.Array, key_B: jax.Array, position_B: jax.Array, temperature_B: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns (the tokens for `position_B`, their log-probabilities at the temperature, where it is 0 at 1)."""
    id_B = sample(logits_BV, jax.vmap(jax.random.fold_in)(key_B, position_B), temperature_B)
    scaled_BV = logits_BV.astype(jnp.float32) / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    logp_BV = jax.nn.log_softmax(scaled_BV)
    return id_B, jnp.take_along_axis(logp_BV, id_B[:, None], axis=1)[:, 0]

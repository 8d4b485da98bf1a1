"""Rollouts: answers to a batch of prompts as one program, drawn with the weights that are being trained.

    prefill   all prompts, padded at the end to one length
    decode    one token per answer and turn of a loop, until all have ended or are as long as allowed; the last one of
              an answer is not read

A draw depends on the key of its row, the position and the weights alone, as in `serve.generate`, so rows do not depend
on their neighbours. Each token keeps the log-probability with which it was drawn: at the temperature of the draw, over
the part of the vocabulary that was drawn from, which is kept as well (V3.2's Keep Sampling Mask); and on request the
experts that it visited (V3.2's Keep Routing). On several devices each has its rows, and the loop turns until all
devices have ended: experts are spread over devices, which wait for one another in every layer.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.pipeline import Array
from deepseek_jax.layers.block import Statistics
from deepseek_jax.layers.cache import first_pass, next_tokens
from deepseek_jax.layers.decoder import Cache, Note
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.mesh import total
from deepseek_jax.rl.grpo import kept_log_softmax
from deepseek_jax.seeds import random_key
from deepseek_jax.serve.sampler import nucleus, sample


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
    # which of the vocabulary each drawn token was drawn from, eight tokens to a byte; of width 0: from all of it
    kept_BTV: Array
    # of each stack of blocks that route, the experts that each token but the last visited, [B, T, L, K] int16; {} where
    # the model's blocks do not report them (`Execution.routes`)
    routes: dict[str, Array]


class Answering(NamedTuple):
    """Answers while they are drawn; ids, log-probabilities and so on as in `Rollouts`."""

    going_B: jax.Array  # which have not ended
    last_B: jax.Array  # the tokens drawn last
    ids_BT: jax.Array
    logp_BT: jax.Array
    kept_BTV: jax.Array
    n_drawn_B: jax.Array


def pad(prompts: Sequence[np.ndarray], n_tokens: int, keys: np.ndarray, temperature: float) -> Prompts:
    """Returns prompts of any lengths up to `n_tokens` as arrays; `keys` are those of `row_keys`."""
    ids_BT = np.zeros((len(prompts), n_tokens), np.int32)
    for row, prompt in zip(ids_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    lengths = np.array([[len(prompt)] for prompt in prompts], np.int32)
    return Prompts(ids_BT, lengths, keys, np.full((len(prompts), 1), temperature, np.float32))


def row_keys(seed: int, step: int, n_rows: int) -> np.ndarray:
    """Returns key_BK: the data of one key per row, a function of (seed, step, row) alone."""
    return np.asarray(_row_keys(random_key(seed), np.uint32(step), n_rows))


@functools.partial(jax.jit, static_argnums=2)
def _row_keys(key: jax.Array, step: jax.Array, n_rows: int) -> jax.Array:
    keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.fold_in(key, step), jnp.arange(n_rows))
    return jax.random.key_data(keys)


def roller(n_new: int, stop_ids: Sequence[int], top_p: float) -> Callable[[Any, Prompts], Rollouts]:
    """Returns `rollout(model, prompts)`, of up to `n_new` tokens from the nucleus; inside `per_device` only."""
    ends = np.asarray(stop_ids, np.int32)

    def rollout(model: Any, prompts: Prompts) -> Rollouts:
        (n_rows, n_prompt), length_B = prompts.ids_BT.shape, prompts.length_B1[:, 0]
        key_B, rows = jax.random.wrap_key_data(prompts.key_BK), jnp.arange(n_rows)
        real_BT = jnp.arange(n_prompt) < length_B[:, None]
        read = Tokens.of(prompts.ids_BT, real_BT=real_BT)
        note = first_routes(n_new) if model.run.routes else None
        h_BTD, cache = model.generating(read, first_pass(n_prompt + n_new), note=note)
        logits_BV = model.head(jnp.take_along_axis(h_BTD, (length_B - 1)[:, None, None], axis=1))[:, 0]

        def drawn(n: jax.Array, logits_BV: jax.Array, so_far: Answering) -> Answering:
            """Draws the token number n of each answer."""
            going_B, at_B = so_far.going_B, length_B + n
            id_B, logp_B, kept_BV = draw(logits_BV, key_B, at_B, prompts.temperature_B1[:, 0], top_p)
            return Answering(
                going_B=going_B & ~jnp.isin(id_B, ends),
                last_B=id_B,
                ids_BT=so_far.ids_BT.at[rows, at_B].set(jnp.where(going_B, id_B, so_far.ids_BT[rows, at_B])),
                logp_BT=so_far.logp_BT.at[rows, at_B].set(jnp.where(going_B, logp_B, 0.0)),
                kept_BTV=so_far.kept_BTV.at[rows, at_B].set(jnp.where(going_B[:, None], kept_BV, 0)),
                n_drawn_B=so_far.n_drawn_B + going_B,
            )

        def is_unfinished(carry: tuple) -> jax.Array:
            return (carry[0] < n_new) & (total(jnp.any(carry[1].going_B).astype(jnp.int32)) > 0)

        def advance(carry: tuple) -> tuple:
            n, so_far, cache = carry
            at_B = length_B + n - 1
            read = Tokens(so_far.last_B[:, None], at_B[:, None])
            note = more_routes(rows, at_B) if model.run.routes else None
            h_BTD, cache = model.generating(read, next_tokens, cache, note)
            return n + 1, drawn(n, model.head(h_BTD)[:, 0], so_far), cache

        ids_BT = jnp.zeros((n_rows, n_prompt + n_new), jnp.int32).at[:, :n_prompt].set(prompts.ids_BT)
        zeros_BT, zeros_B = jnp.zeros(ids_BT.shape, jnp.float32), jnp.zeros(n_rows, jnp.int32)
        kept_BTV = jnp.zeros((*ids_BT.shape, n_bytes(logits_BV.shape[1], top_p)), jnp.uint8)
        nothing = Answering(jnp.ones(n_rows, bool), zeros_B, ids_BT, zeros_BT, kept_BTV, zeros_B)
        first = drawn(jnp.int32(0), logits_BV, nothing)
        _, found, cache = jax.lax.while_loop(is_unfinished, advance, (jnp.int32(1), first, cache))
        routes = routes_of(model, cache) if model.run.routes else {}
        is_finished_B1 = ~found.going_B[:, None]
        return Rollouts(found.ids_BT, found.logp_BT, found.n_drawn_B[:, None], is_finished_B1, found.kept_BTV, routes)

    return rollout


def first_routes(n_new: int) -> Note:
    """Returns the note of the experts of prompts, with memory for those of `n_new` tokens."""

    def note(_: None, statistics: Statistics) -> jax.Array | None:
        found_BTK = statistics.routes_BTK
        return None if found_BTK is None else jnp.pad(found_BTK, ((0, 0), (0, n_new), (0, 0)))

    return note


def more_routes(rows: jax.Array, at_B: jax.Array) -> Note:
    """Returns the note of the experts of one more token per row, at its position."""

    def note(noted_BTK: jax.Array | None, statistics: Statistics) -> jax.Array | None:
        found_BTK = statistics.routes_BTK
        return None if noted_BTK is None or found_BTK is None else noted_BTK.at[rows, at_B].set(found_BTK[:, 0])

    return note


def routes_of(model: Any, cache: Cache) -> dict[str, jax.Array]:
    """Returns what was noted, as `Rollouts.routes` has it."""
    pairs = cache if model.run.unroll else {name: (None, stacked(cache[name])) for name in model.stacks}
    return {name: jnp.moveaxis(noted, 0, 2) for name, (_, noted) in pairs.items() if noted is not None}


def stacked(layers: tuple) -> jax.Array | None:
    """Returns what was noted where each layer has a pair of its own, as `run_cached` keeps them without a loop."""
    found = [noted for _, noted in layers if noted is not None]
    return jnp.stack(found) if found else None


def n_bytes(vocab_size: int, top_p: float) -> int:
    """Returns the width of `Rollouts.kept_BTV`."""
    return -(-vocab_size // 8) if top_p < 1 else 0


def draw(
    logits_BV: jax.Array, key_B: jax.Array, position_B: jax.Array, temperature_B: jax.Array, top_p: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns (the tokens for `position_B`, their log-probabilities, what they were drawn from as `kept_BTV` has it).

    Log-probabilities are at the temperature; where it is 0, at 1.
    """
    keys_B = jax.vmap(jax.random.fold_in)(key_B, position_B)
    scaled_BV = logits_BV.astype(jnp.float32) / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    if top_p < 1:
        id_B = sample(logits_BV, keys_B, temperature_B, top_p)
        kept_BV = nucleus(scaled_BV, jnp.full(temperature_B.shape, top_p, jnp.float32))
        logp_BV, bits_BV = kept_log_softmax(scaled_BV, kept_BV), jnp.packbits(kept_BV, axis=-1)
    else:
        id_B, logp_BV = sample(logits_BV, keys_B, temperature_B), jax.nn.log_softmax(scaled_BV)
        bits_BV = jnp.zeros((len(logits_BV), 0), jnp.uint8)
    return id_B, jnp.take_along_axis(logp_BV, id_B[:, None], axis=1)[:, 0], bits_BV

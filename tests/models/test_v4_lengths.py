"""V4's twin at every length from 1 to 300: decoding = prompts = whole sequences, ragged batches, chunks, causality.

One text of 300 tokens has every length in it: what is decoded at position p is decoding after p tokens, so a row that
begins with one token and continues to the end compares 299 of them. Which prompt a row begins with matters through what
it leaves in the cache: of the window's ring (32 tokens) and the compressors' open blocks (4 and 16 tokens, 8 where they
overlap) only the length modulo 32 and whether that ring is full, of the entries how many there are and whether the
indexer chooses among them (from 65 tokens on). So the rows begin at these borders and beside them; with `-m matrix` at
every length, and prompts are read in parts. All rows share the compiled programs.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import run_config
from deepseek_jax.layers.base import bind
from deepseek_jax.models import v4

T, V, CHUNK = 300, 64, 37  # longest text, ids, tokens of a part: no border of a block is one of a part for long
NARROW = {"vocab_size": V, "d_model": 32, "n_heads": 2, "head_width": 16, "rope_width": 8, "q_rank": 16, "out_rank": 8}
NARROW |= {"index_heads": 2, "index_width": 8, "n_experts": 6, "expert_width": 16, "top_k": 2}
BORDERS = (1, 4, 17, 31, 33, 64, 65, 255)
B = len(BORDERS)


class Twin:
    """The twin with its own window, ratios and top-k, and narrow; two texts, and the logits of each read alone."""

    def __init__(self, filled):
        m = run_config.load("tiny_v4").model
        assert (m.window, m.compress_ratios, m.index_top_k) == (32, (0, 4, 16, 4, 16, 0), 16)
        m.update(NARROW)
        definition, params, biases = filled(lambda: v4.Model(v4.Config.from_config(m), rngs=nnx.Rngs(0)), std=0.15)
        draw = np.random.default_rng(2)
        table = biases["blocks_0"]["experts"]["router"]["experts_VK"]
        biases["blocks_0"]["experts"]["router"]["experts_VK"] = np.int32(
            draw.random((*table.shape[:2], m.n_experts)).argsort(-1)[..., : m.top_k]
        )
        self.texts_NT = draw.integers(0, V, (2, T)).astype(np.int32)

        def jit(function):
            def bound(params, *arguments):
                return function(bind(definition, params, biases), *arguments)

            return functools.partial(jax.jit(bound), params)

        self.full = jit(lambda model, ids_1T: model(ids_1T))
        self.prefill, self.extend, self.decode = jit(prefill), jit(extend), jit(decode)
        self.known_NTV = np.concatenate([self.full(text_T[None]) for text_T in self.texts_NT])


def prefill(model, ids_BT, n_B):
    h_BTD, cache = model.prefill(ids_BT, T, jnp.arange(T) < n_B[:, None])
    return model.head(h_BTD), cache


def extend(model, ids_BT, start, n, cache):
    real_BT = jnp.broadcast_to(jnp.arange(CHUNK) < n, (B, CHUNK))
    h_BTD, cache = model.extend(ids_BT, start, cache, real_BT)
    return model.head(h_BTD), cache


def decode(model, ids_BT, n_B, n_steps, cache):
    """Logits of up to `n_steps` tokens from position n on, where they belong."""
    rows_B = jnp.arange(B)

    def step(number, carry):
        cache, logits_BTV = carry
        at_B = jnp.minimum(n_B + number, T - 1)
        found_B1V, cache = model.decode(ids_BT[rows_B, at_B][:, None], at_B[:, None], cache)
        is_text_B1 = (n_B + number < T)[:, None]
        return cache, logits_BTV.at[rows_B, at_B].set(jnp.where(is_text_B1, found_B1V[:, 0], logits_BTV[rows_B, at_B]))

    return jax.lax.fori_loop(0, n_steps, step, (cache, jnp.full((B, T, V), jnp.nan)))[1]


@pytest.fixture(scope="module")
def twin(filled):
    return Twin(filled)


def check(twin, lengths, n_steps):
    """Prompts of these lengths, of one text and the other in turn, padded with anything, then single tokens."""
    number_B, n_B = np.arange(B) % 2, np.int32(lengths)
    ids_BT, expected_BTV = twin.texts_NT[number_B], twin.known_NTV[number_B]
    is_prompt_BT = np.arange(T) < n_B[:, None]
    read_BTV, cache = twin.prefill(np.where(is_prompt_BT, ids_BT, 7), n_B)
    np.testing.assert_allclose(np.asarray(read_BTV)[is_prompt_BT], expected_BTV[is_prompt_BT], atol=5e-5)
    decoded_BTV = np.asarray(twin.decode(ids_BT, n_B, n_steps, cache))
    is_decoded_BT = ~is_prompt_BT & (np.arange(T) < n_B[:, None] + n_steps)
    np.testing.assert_array_equal(~np.isnan(decoded_BTV[..., 0]), is_decoded_BT)
    np.testing.assert_allclose(decoded_BTV[is_decoded_BT], expected_BTV[is_decoded_BT], atol=5e-5)


@pytest.mark.slow
def test_rows_that_begin_at_any_border_decode_to_the_end_as_each_text_alone(twin):
    assert twin.known_NTV.std() > 0.1
    check(twin, BORDERS, T - 1)


@pytest.mark.matrix
@pytest.mark.slow
def test_prompts_of_every_length_then_a_few_tokens(twin):
    for first in range(1, T, B):
        check(twin, np.minimum(np.arange(first, first + B), T - 1), 20)


@pytest.mark.matrix
@pytest.mark.slow
def test_prompts_in_parts_are_read_as_whole(twin):
    ids_BT = np.pad(twin.texts_NT[np.arange(B) % 2], ((0, 0), (0, CHUNK)), constant_values=7)
    read_BTV, cache = twin.prefill(ids_BT[:, :T], np.full(B, CHUNK, np.int32))
    found = [np.asarray(read_BTV)[:, :CHUNK]]
    for start in range(CHUNK, T, CHUNK):
        n = min(CHUNK, T - start)
        read_BTV, cache = twin.extend(ids_BT[:, start : start + CHUNK], np.int32(start), np.int32(n), cache)
        found.append(np.asarray(read_BTV)[:, :n])
    found_BTV = np.concatenate(found, axis=1)
    np.testing.assert_allclose(found_BTV[:2], twin.known_NTV, atol=5e-5)


@pytest.mark.slow
@pytest.mark.parametrize("place", [3, 4, 15, 16, 31, 32, 63, 64, 255, 256])
def test_no_token_at_a_border_moves_an_earlier_logit(twin, place):
    text_1T, was_TV = twin.texts_NT[:1].copy(), twin.known_NTV[0]
    text_1T[0, place] = (text_1T[0, place] + 1) % V
    now_TV = np.asarray(twin.full(text_1T))[0]
    np.testing.assert_array_equal(was_TV[:place], now_TV[:place])
    assert np.abs(was_TV[place] - now_TV[place]).max() > 1e-3
    assert np.abs(was_TV[place + 1 :] - now_TV[place + 1 :]).max() > 1e-3

"""The next token from its logits: temperature, nucleus (top-p), top-k, min-p, penalties, biases; log-probabilities.

    x = logits + bias, repeated tokens made less likely                        (`biased`, `penalised`)
    p = softmax(x / temperature)
    token = argmax over the kept tokens of x / temperature + g,   g_v Gumbel noise of the row's key
    kept: of the top_k likeliest those with p_v >= min_p max p, and of these the nucleus, which is the fewest, likeliest
    first, whose p (which add up to 1 again) add up to top_p

Temperature 0 takes the likeliest token. Every row is sampled with its own key, and every token of the vocabulary has
its own noise, so that a draw depends on nothing but key and logits: neither on the neighbours in the batch nor on how
the kept tokens were found. Nothing is sorted. Everything is in float32. Papers: Holtzman et al., "The Curious Case of
Neural Text Degeneration", arXiv 1904.09751 (nucleus); Nguyen et al., "Turning Up the Heat", arXiv 2407.01082 (min-p);
Keskar et al., "CTRL", arXiv 1909.05858, section 4.1 (repetition penalty).
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from deepseek_jax.layers.cache import read_pages
from deepseek_jax.seeds import random_key


class Penalties(NamedTuple):
    """How much less likely each row makes tokens that it has already."""

    presence_B: jax.Array  # subtracted from the logits of tokens that were drawn before
    frequency_B: jax.Array  # subtracted as often as they were drawn
    repetition_B: jax.Array  # factor for those of the prompt too: positive logits are divided by it, others multiplied


class Scores(NamedTuple):
    """Log-probabilities of tokens under softmax(logits), whatever they were drawn from; float32."""

    logprob_B: jax.Array  # of the token itself
    top_BK: jax.Array  # of the likeliest ones, descending
    top_ids_BK: jax.Array  # which these are


def row_keys(seed: int, n_rows: int) -> jax.Array:
    """Returns key_B: one key per row, a function of the seed and the row's number only."""
    return jax.vmap(jax.random.fold_in, (None, 0))(random_key(seed), jnp.arange(n_rows))


def sample(
    logits_BV: jax.Array,
    key_B: jax.Array,
    temperature: ArrayLike | None = None,
    top_p: ArrayLike | None = None,
    top_k: ArrayLike | None = None,
    min_p: ArrayLike | None = None,
) -> jax.Array:
    """Samples one token per row. Each number is one for all rows, or one per row.

    Args:
        logits_BV: logits in any float dtype.
        key_B: one key per row (`row_keys`).
        temperature: 0 takes the argmax. None: 0 for all, and no noise is made.
        top_p: 1 keeps every token, 0 only the likeliest. None: 1 for all, and no nucleus is searched.
        top_k: the number of tokens that are kept, of equal ones the first. None: all of them.
        min_p: the least probability of a token that is kept, that of the likeliest being 1. None: 0.

    Returns id_B, int32.
    """
    likeliest_B = largest(logits_BV)
    if temperature is None:
        return likeliest_B
    temperature_B = jnp.broadcast_to(jnp.asarray(temperature, jnp.float32), likeliest_B.shape)
    x_BV = logits_BV.astype(jnp.float32) / jnp.where(temperature_B > 0, temperature_B, 1.0)[:, None]
    if top_k is not None:
        x_BV = jnp.where(likeliest(x_BV, jnp.broadcast_to(top_k, likeliest_B.shape)), x_BV, -jnp.inf)
    if min_p is not None:
        least_B = jnp.max(x_BV, axis=-1) + jnp.broadcast_to(jnp.log(jnp.asarray(min_p)), likeliest_B.shape)
        x_BV = jnp.where(x_BV >= least_B[:, None], x_BV, -jnp.inf)
    if top_p is not None:
        top_p_B = jnp.broadcast_to(jnp.asarray(top_p, jnp.float32), likeliest_B.shape)
        x_BV = jnp.where(nucleus(x_BV, top_p_B), x_BV, -jnp.inf)
    noise_BV = jax.vmap(lambda key: jax.random.gumbel(key, logits_BV.shape[1:]))(key_B)
    drawn_B = largest(x_BV + noise_BV)
    return jnp.where(temperature_B > 0, drawn_B, likeliest_B)


def largest(x_BV: jax.Array) -> jax.Array:
    """Returns which entry of each row is the largest, of equal ones the first; int32. Of a row with NaN any entry.

    This is `jnp.argmax`, on a CPU in two passes: XLA reduces pairs of value and index one at a time there.
    """
    if jax.default_backend() != "cpu":
        return jnp.argmax(x_BV, axis=-1).astype(jnp.int32)
    is_less_BV, index_V = x_BV < jnp.max(x_BV, axis=-1, keepdims=True), jnp.arange(x_BV.shape[-1], dtype=jnp.int32)
    return jnp.min(jnp.where(is_less_BV, x_BV.shape[-1], index_V), axis=-1)


def permitted(logits_BV: jax.Array, allowed_BW: jax.Array) -> jax.Array:
    """Returns the logits, -inf where bit v % 32 of word v // 32 of a row's `allowed_BW` (uint32) is not set."""
    token_V = jnp.arange(logits_BV.shape[1])
    bit_BV = allowed_BW[:, token_V // 32] >> (token_V % 32).astype(jnp.uint32) & 1
    return jnp.where(bit_BV == 1, logits_BV, -jnp.inf)


def draw(logits_BV: jax.Array, position_B: jax.Array, how: dict[str, jax.Array]) -> jax.Array:
    """Draws the tokens for `position_B`: a row's key and the position determine the noise.

    `how` is what `sampling.arguments` says; for penalties also the rows' pages (`table_BN` of the tokens `ids_PS`) and
    the lengths of their prompts, for masks `allowed_RW` and the rows' places in it.
    """
    if not how:
        return sample(logits_BV, position_B)
    if "n_prompt_B" in how:
        logits_BV = _shaped(logits_BV, position_B, **how)
    key_B = jax.vmap(jax.random.fold_in)(jax.random.wrap_key_data(how["key_BK"]), position_B)
    numbers = [how.get(name) for name in ("temperature_B", "top_p_B", "top_k_B", "min_p_B")]
    return sample(logits_BV, key_B, *numbers)


def _shaped(
    logits_BV: jax.Array,
    position_B: jax.Array,
    *,
    ids_PS: jax.Array,
    table_BN: jax.Array,
    n_prompt_B: jax.Array,
    allowed_RW: jax.Array,
    mask_B: jax.Array,
    bias_ids_BJ: jax.Array,
    bias_BJ: jax.Array,
    presence_B: jax.Array,
    frequency_B: jax.Array,
    repetition_B: jax.Array,
    **_: jax.Array,
) -> jax.Array:
    """Logits after biases, penalties for the tokens before `position_B`, which lie in the rows' pages, and masks."""
    ids_BS = read_pages(ids_PS, table_BN)
    place_S = jnp.arange(ids_BS.shape[1])
    prompt_BS = place_S < n_prompt_B[:, None]
    drawn_BS = ~prompt_BS & (place_S < position_B[:, None])
    logits_BV = biased(logits_BV, bias_ids_BJ, bias_BJ)
    penalties = Penalties(presence_B, frequency_B, repetition_B)
    logits_BV = penalised(logits_BV, ids_BS, prompt_BS, drawn_BS, penalties)
    return permitted(logits_BV, allowed_RW[mask_B])


def nucleus(logits_BV: jax.Array, top_p_B: jax.Array) -> jax.Array:
    """Returns which tokens are in the nucleus, of equal ones the first; the likeliest always is."""
    return _fewest(logits_BV, jax.nn.softmax(logits_BV, axis=-1), top_p_B) | (top_p_B >= 1.0)[:, None]


def likeliest(logits_BV: jax.Array, n_B: jax.Array) -> jax.Array:
    """Returns which tokens are the `n_B` likeliest, of equal ones the first; all of them if there are no more."""
    return _fewest(logits_BV, jnp.ones_like(logits_BV), n_B.astype(jnp.float32))


def biased(logits_BV: jax.Array, ids_BJ: jax.Array, bias_BJ: jax.Array) -> jax.Array:
    """Returns the logits with `bias_BJ` added to those of the tokens `ids_BJ`."""
    return jnp.asarray(logits_BV).at[jnp.arange(len(ids_BJ))[:, None], ids_BJ].add(bias_BJ)


def penalised(
    logits_BV: jax.Array, ids_BS: jax.Array, prompt_BS: jax.Array, drawn_BS: jax.Array, penalties: Penalties
) -> jax.Array:
    """Returns the logits of rows that have the tokens `ids_BS`, of which some are prompt and some were drawn."""
    rows, none_BV = jnp.arange(len(ids_BS))[:, None], jnp.zeros(logits_BV.shape, jnp.int32)
    drawn_BV = none_BV.at[rows, ids_BS].add(drawn_BS.astype(jnp.int32))
    is_known_BV = none_BV.at[rows, ids_BS].max((prompt_BS | drawn_BS).astype(jnp.int32)) > 0
    presence_B1, frequency_B1, repetition_B1 = (number_B[:, None] for number_B in penalties)
    repeated_BV = jnp.where(logits_BV > 0, logits_BV / repetition_B1, logits_BV * repetition_B1)
    logits_BV = jnp.where(is_known_BV, repeated_BV, logits_BV)
    return logits_BV - presence_B1 * (drawn_BV > 0) - frequency_B1 * drawn_BV


def scores(logits_BV: jax.Array, id_B: jax.Array, n_top: int) -> Scores:
    """Returns the log-probabilities of tokens, and the `n_top` likeliest of each row."""
    logprobs_BV = jax.nn.log_softmax(logits_BV.astype(jnp.float32), axis=-1)
    logprob_B = jnp.take_along_axis(logprobs_BV, id_B[:, None], axis=-1)[:, 0]
    return Scores(logprob_B, *lax.top_k(logprobs_BV, n_top))


def no_scores(shape: tuple[int, ...], n_top: int) -> Scores:
    """`Scores` with these axes in place of B, all zeros."""
    top = jnp.zeros((*shape, n_top), jnp.float32)
    return Scores(jnp.zeros(shape, jnp.float32), top, top.astype(jnp.int32))


def _fewest(logits_BV: jax.Array, mass_BV: jax.Array, target_B: jax.Array) -> jax.Array:
    """Returns which tokens are the fewest, likeliest first, of equal ones the first, whose masses add up to a target.

    The smallest logit among them is found bit by bit: 32 sums over the vocabulary instead of a sort.
    """
    order_BV = _ordered(logits_BV)
    most_B = jnp.max(order_BV, axis=-1)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low_B, high_B = bounds  # those from `low` on add up to the target, those from `high` on do not
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # their mean, rounded down, without overflow
        is_enough_B = jnp.sum(jnp.where(order_BV >= middle_B[:, None], mass_BV, 0), axis=-1) >= target_B
        return jnp.where(is_enough_B, middle_B, low_B), jnp.where(is_enough_B, high_B, middle_B)

    all_B = jnp.full_like(most_B, jnp.iinfo(jnp.int32).min)
    last_B, _ = lax.fori_loop(0, 32, halve, (all_B, jnp.maximum(most_B, 0x7F800000) + 1))
    last_B1 = jnp.minimum(last_B, most_B)[:, None]
    equal_BV = order_BV == last_B1
    above_B1 = jnp.sum(jnp.where(order_BV > last_B1, mass_BV, 0), axis=-1, keepdims=True)
    number_BV = jnp.cumsum(equal_BV, axis=-1) - 1  # among the equal ones
    is_needed_BV = above_B1 + number_BV * mass_BV < target_B[:, None]
    is_first_BV = (number_BV == 0) & (last_B1 == most_B[:, None])
    return (order_BV > last_B1) | (equal_BV & (is_needed_BV | is_first_BV))


def _ordered(x: jax.Array) -> jax.Array:
    """Returns float32 numbers as int32 ones in the same order."""
    bits = lax.bitcast_convert_type(jnp.where(x == 0, 0.0, x), jnp.int32)  # -0.0 equals 0.0
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)

"""Cross-entropy that never holds the logits of all tokens: it goes through them in chunks.

    nll_m = -log softmax(h_m W)[target_m]

`cross_entropy` sums w_m * nll_m with weights that are known in advance. While a chunk's logits are there it computes
its share of the gradients as well, so that nothing is kept and nothing is computed twice: three products with W.
`token_nll` returns every nll_m, for a loss that is any function of them, and `token_figures` the entropies as well. The
weight of each token is known in the backward pass only: it makes the logits again, four products, unless all tokens are
one chunk, whose probabilities are kept.
"""

import functools

import jax
import jax.numpy as jnp

from deepseek_jax.parallel.vocabulary import WHOLE, Vocabulary

IGNORE = -1  # a target that is not there


def _chunks(h_MD: jax.Array, targets_M: jax.Array, weights_M: jax.Array, chunk: int) -> tuple[jax.Array, ...]:
    """The arrays cut to (chunks, chunk, …), filled up with ignored rows."""
    chunk = min(chunk, targets_M.shape[0])
    n_chunks = -(-targets_M.shape[0] // chunk)
    spare = n_chunks * chunk - targets_M.shape[0]
    h_MD = jnp.pad(h_MD, ((0, spare), (0, 0)))
    targets_M = jnp.pad(targets_M, (0, spare), constant_values=IGNORE)
    weights_M = jnp.pad(weights_M, (0, spare))
    return h_MD.reshape(n_chunks, chunk, -1), targets_M.reshape(n_chunks, chunk), weights_M.reshape(n_chunks, chunk)


def _nll(
    h_MD: jax.Array, weight_DV: jax.Array, targets_M: jax.Array, vocabulary: Vocabulary, temperature: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(nll_M, softmax probabilities_MV, entropy_M) of one chunk; the nll of an ignored row means nothing."""
    logits_MV = jnp.einsum("MD,DV->MV", h_MD, weight_DV, preferred_element_type=jnp.float32) / temperature
    highest_M = vocabulary.largest(jnp.max(logits_MV, axis=-1))
    shifted_MV = jnp.exp(logits_MV - highest_M[:, None])
    total_M = vocabulary.total(jnp.sum(shifted_MV, axis=-1))
    target_M = vocabulary.picked(logits_MV, jnp.maximum(targets_M, 0))
    whole_M, probabilities_MV = jnp.log(total_M) + highest_M, shifted_MV / total_M[:, None]
    return (
        whole_M - target_M,
        probabilities_MV,
        whole_M - vocabulary.total(jnp.sum(probabilities_MV * logits_MV, axis=-1)),
    )


def _chunk_loss(
    h_MD: jax.Array,
    weight_DV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    vocabulary: Vocabulary,
    temperature: float = 1.0,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(summed loss, softmax probabilities_MV, weight of each row: 0 without a target) of one chunk."""
    nll_M, probabilities_MV, _ = _nll(h_MD, weight_DV, targets_M, vocabulary, temperature)
    weights_M = jnp.where(targets_M != IGNORE, weights_M, 0.0)
    return jnp.sum(jnp.where(weights_M != 0, weights_M * nll_M, 0.0)), probabilities_MV, weights_M


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    h_MD: jax.Array,
    weight_DV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    chunk: int,
    vocabulary: Vocabulary = WHOLE,
) -> jax.Array:
    """Sum over the tokens of w * -log softmax(h W)[target], in nats.

    Args:
        h_MD: hidden states, in the compute dtype.
        weight_DV: the output head (cast to the dtype of `h_MD`; products accumulated in float32).
        targets_M: ids to predict; -1 is left out of the sum.
        weights_M: w of each target, float32; a constant, to which no gradient flows.
        chunk: tokens whose logits exist at a time.
        vocabulary: which columns of the head are here; all devices that share it work on the same tokens.

    Returns a float32 scalar.
    """

    def body(total: jax.Array, part: tuple) -> tuple[jax.Array, None]:
        h, targets, weights = part
        return total + _chunk_loss(h, weight_DV.astype(h.dtype), targets, weights, vocabulary)[0], None

    return jax.lax.scan(body, jnp.float32(0), _chunks(h_MD, targets_M, weights_M, chunk))[0]


def _gradients(
    h_MD: jax.Array,
    weight_DV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    probabilities_MV: jax.Array,
    vocabulary: Vocabulary,
) -> tuple[jax.Array, jax.Array]:
    """(d_h_MD, d_weight_DV in float32) of a chunk, from its probabilities; rows without a target have weight 0."""
    summed = h_MD.dtype if vocabulary.axis is None else jnp.float32  # d_h is rounded once
    is_target_MV = jnp.arange(weight_DV.shape[1]) == vocabulary.index(targets_M, weight_DV.shape[1])[:, None]
    d_logits_MV = ((probabilities_MV - is_target_MV) * weights_M[:, None]).astype(h_MD.dtype)
    d_h_MD = jnp.einsum("MV,DV->MD", d_logits_MV, weight_DV, preferred_element_type=summed)
    d_weight_DV = jnp.einsum("MD,MV->DV", h_MD, d_logits_MV, preferred_element_type=jnp.float32)
    return vocabulary.total(d_h_MD).astype(h_MD.dtype), d_weight_DV


def _forward(
    h_MD: jax.Array,
    weight_DV: jax.Array,
    targets_M: jax.Array,
    weights_M: jax.Array,
    chunk: int,
    vocabulary: Vocabulary,
    temperature: float = 1.0,
) -> tuple[jax.Array, tuple]:
    weight = weight_DV.astype(h_MD.dtype)

    def body(carry: tuple, part: tuple) -> tuple[tuple, jax.Array]:
        (total, d_weight_DV), (h, targets, weights) = carry, part
        loss, probabilities_MV, weights = _chunk_loss(h, weight, targets, weights, vocabulary, temperature)
        d_h_MD, more_DV = _gradients(h, weight, targets, weights, probabilities_MV, vocabulary)
        return (total + loss, d_weight_DV + more_DV), d_h_MD

    start = (jnp.float32(0), jnp.zeros(weight_DV.shape, jnp.float32))
    (total, d_weight_DV), d_h = jax.lax.scan(body, start, _chunks(h_MD, targets_M, weights_M, chunk))
    d_h_MD = d_h.reshape(-1, h_MD.shape[1])[: h_MD.shape[0]]
    return total, (d_h_MD, d_weight_DV, jnp.zeros((0,), weight_DV.dtype))


def _backward(chunk: int, vocabulary: Vocabulary, saved: tuple, g: jax.Array) -> tuple:
    d_h_MD, d_weight_DV, like = saved
    return (d_h_MD * g).astype(d_h_MD.dtype), (d_weight_DV * g).astype(like.dtype), None, None


cross_entropy.defvjp(_forward, _backward)


def token_nll(
    h_MD: jax.Array, weight_DV: jax.Array, targets_M: jax.Array, chunk: int, temperature: float = 1.0
) -> jax.Array:
    """nll_M, float32: -log softmax(h W / temperature)[target] of every token, in nats; 0 where the target is -1.

    For a loss that is not a sum with constant weights (`cross_entropy` makes that faster). Arguments as there; the
    temperature divides the logits, in float32, as where tokens are drawn.
    """
    return token_figures(h_MD, weight_DV, targets_M, chunk, temperature)[0]


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def token_figures(
    h_MD: jax.Array, weight_DV: jax.Array, targets_M: jax.Array, chunk: int, temperature: float = 1.0
) -> tuple[jax.Array, jax.Array]:
    """(nll_M as of `token_nll`, entropy_M of the distributions, in nats, through which no gradient flows)."""
    weight, zeros_M = weight_DV.astype(h_MD.dtype), jnp.zeros(targets_M.shape, jnp.float32)

    def body(_: None, part: tuple) -> tuple[None, tuple[jax.Array, jax.Array]]:
        h, targets, _ = part
        nll_M, entropy_M = _nll(h, weight, targets, WHOLE, temperature)[::2]
        return None, (jnp.where(targets != IGNORE, nll_M, 0.0), entropy_M)

    found = jax.lax.scan(body, None, _chunks(h_MD, targets_M, zeros_M, chunk))[1]
    nll_M, entropy_M = (each.reshape(-1)[: targets_M.shape[0]] for each in found)
    return nll_M, entropy_M


def _token_forward(
    h_MD: jax.Array, weight_DV: jax.Array, targets_M: jax.Array, chunk: int, temperature: float
) -> tuple[tuple[jax.Array, jax.Array], tuple]:
    saved = (h_MD, weight_DV, targets_M)
    if len(targets_M) > chunk:
        return token_figures(h_MD, weight_DV, targets_M, chunk, temperature), (*saved, None)
    nll_M, probabilities_MV, entropy_M = _nll(h_MD, weight_DV.astype(h_MD.dtype), targets_M, WHOLE, temperature)
    return (jnp.where(targets_M != IGNORE, nll_M, 0.0), entropy_M), (*saved, probabilities_MV)


def _token_backward(chunk: int, temperature: float, saved: tuple, g: tuple[jax.Array, jax.Array]) -> tuple:
    """By the chain rule that of `cross_entropy` with the weights g / temperature, which are known by now."""
    h_MD, weight_DV, targets_M, probabilities_MV = saved
    g_M = g[0] / temperature
    if probabilities_MV is None:
        _, (d_h_MD, d_weight_DV, _) = _forward(h_MD, weight_DV, targets_M, g_M, chunk, WHOLE, temperature)
    else:
        weight, weights_M = weight_DV.astype(h_MD.dtype), jnp.where(targets_M != IGNORE, g_M, 0.0)
        d_h_MD, d_weight_DV = _gradients(h_MD, weight, targets_M, weights_M, probabilities_MV, WHOLE)
    return d_h_MD, d_weight_DV.astype(weight_DV.dtype), None


token_figures.defvjp(_token_forward, _token_backward)

"""The public function: arguments are checked once, then the named implementation runs.

An implementation is a module with two functions; what surrounds them (checks, what is saved between them, the part of
the gradient that is the same for all) stands here.

    forward(q_BTHQ, k_BSZQ, v_BSZU, segments, q_offset, *, scale) -> (o_BTHU, lse_BHT)
    backward(q_BTHQ, k_BSZQ, v_BSZU, segments, q_offset, lse_BHT, do_BTHU, delta_BHT, *, scale) -> (dq, dk, dv)

`segments` is None or the documents of queries and keys, int32 [B, T] and [B, S]; `q_offset` an int, or an int32 scalar
that is known when the program runs. The backward pass computes the weights P = exp(s - lse) again:

    dv_j = sum_i P_ij do_i        ds_ij = P_ij (do_i . v_j - delta_i)        delta_i = do_i . o_i - dlse_i
    dq_i = scale sum_j ds_ij k_j        dk_j = scale sum_i ds_ij q_i

P is 0 where lse is -inf. `attention` lets jax differentiate the reference.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from pallas_kernels.mla_attention import chunked, reference
from pallas_kernels.mla_attention.reference import Segments

IMPLEMENTATIONS = ("reference", "chunked", "mosaic_gpu", "mosaic_tpu")
SAVED = ("attention_out", "attention_lse")  # names, for `jax.checkpoint`, of what the forward pass saves besides inputs


def attention(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    *,
    implementation: str,
    scale: float,
    segments: Segments | None = None,
    q_offset: int | jax.Array = 0,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention: (o_BTHU in the dtype of v, lse_BHT). Differentiable in q, k and v, through both results.

    lse is the natural logarithm of the sum of a query's exponentiated scores, float32 (float64 for float64 inputs):
    results over parts of the keys are combined by it. A query that sees no key gives o = 0 and lse = -inf, and adds
    nothing to any gradient. Products take operands in the dtype of the inputs and sum in float32.

    Args:
        q_BTHQ: queries; query i stands at position i + q_offset.
        k_BSZQ, v_BSZU: keys and values, key j at position j, in the dtype of q. H is a multiple of Z; the width U of
            values may differ from Q. Keys that no query sees must be finite as well.
        implementation: "reference" (any device, stores all scores), "chunked" (any device, memory linear in T and S),
            "mosaic_gpu" (Hopper, 16 bits, widths that are multiples of 64) or "mosaic_tpu" (bfloat16 or float32, widths
            as there). There is no fallback from one to another.
        scale: factor of the scores.
        segments: documents of the queries [B, T] and of the keys [B, S], integers; a query sees only keys of its own
            document. None: all are of one.
        q_offset: position of the first query; an int, or an integer scalar known when the program runs. It may be
            negative: those queries see nothing.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    _check(q_BTHQ, k_BSZQ, v_BSZU, segments, q_offset)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    if implementation == "reference":
        return reference.attention(q_BTHQ, k_BSZQ, v_BSZU, scale=scale, segments=segments, q_offset=q_offset)
    if segments is not None:
        segments = (segments[0].astype(jnp.int32), segments[1].astype(jnp.int32))
    known = q_offset if isinstance(q_offset, int) else None
    offset = None if known is not None else jnp.asarray(q_offset, jnp.int32)
    arrays = _varying_alike((q_BTHQ, k_BSZQ, v_BSZU, segments, offset))
    return _attention(*arrays, _How(implementation, scale, known))


def implementation(name: str) -> Any:
    """Returns the module of an implementation, whose two functions compute attention to some of the keys.

    For a caller that combines parts: `backward` takes lse and delta of all keys together, and gives the part's
    gradients. Arguments are as above, and not checked.
    """
    if name == "mosaic_gpu":
        from pallas_kernels.mla_attention import gpu  # Mosaic GPU is not part of every JAX build

        return gpu
    if name == "mosaic_tpu":
        from pallas_kernels.mla_attention import tpu  # nor is Mosaic TPU

        return tpu
    return {"chunked": chunked, "reference": reference}[name]


@dataclass(frozen=True)
class _How:
    """What is known of a call when it is traced."""

    implementation: str
    scale: float
    q_offset: int | None  # None: it is an array

    def module(self) -> Any:
        """The implementation."""
        return implementation(self.implementation)


def _computed(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    offset: jax.Array | None,
    how: _How,
) -> tuple[jax.Array, jax.Array]:
    q_offset = offset if how.q_offset is None else how.q_offset
    return how.module().forward(q_BTHQ, k_BSZQ, v_BSZU, segments, q_offset, scale=how.scale)


_attention = jax.custom_vjp(_computed, nondiff_argnums=(5,))


def _forward(
    q_BTHQ: jax.Array,
    k_BSZQ: jax.Array,
    v_BSZU: jax.Array,
    segments: Segments | None,
    offset: jax.Array | None,
    how: _How,
) -> tuple:
    results = _computed(q_BTHQ, k_BSZQ, v_BSZU, segments, offset, how)
    o_BTHU, lse_BHT = (checkpoint_name(x, name) for x, name in zip(results, SAVED, strict=True))
    return (o_BTHU, lse_BHT), (q_BTHQ, k_BSZQ, v_BSZU, segments, offset, o_BTHU, lse_BHT)


def _backward(how: _How, saved: tuple, gradients: tuple[jax.Array, jax.Array]) -> tuple:
    *inputs, offset, o_BTHU, lse_BHT = saved
    do_BTHU, dlse_BHT = gradients
    delta_BHT = jnp.einsum("BTHU,BTHU->BHT", do_BTHU.astype(lse_BHT.dtype), o_BTHU.astype(lse_BHT.dtype)) - dlse_BHT
    delta_BHT = jnp.where(lse_BHT == -jnp.inf, 0, delta_BHT)  # dlse may be anything there
    q_offset = offset if how.q_offset is None else how.q_offset
    found = how.module().backward(*inputs, q_offset, lse_BHT, do_BTHU, delta_BHT, scale=how.scale)
    return *found, None, None


_attention.defvjp(_forward, _backward)


def _varying_alike(arrays: tuple) -> tuple:
    """The arrays, each marked as varying over the mesh axes of a `shard_map` over which any of them varies.

    So that gradients, which vary as all inputs together do, have the types of what they are gradients of.
    """
    axes = frozenset().union(*(jax.typeof(x).mat.varying for x in jax.tree.leaves(arrays)))

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(axes - jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, arrays)


def _check(
    q_BTHQ: jax.Array, k_BSZQ: jax.Array, v_BSZU: jax.Array, segments: Segments | None, q_offset: int | jax.Array
) -> None:
    q, k, v = q_BTHQ.shape, k_BSZQ.shape, v_BSZU.shape
    shapes = f"q {q}, k {k}, v {v}"
    if not (len(q) == len(k) == len(v) == 4 and q[0] == k[0] and q[3] == k[3] and k[:3] == v[:3]):
        raise ValueError(f"{shapes}: expected [B, T, H, Q], [B, S, Z, Q] and [B, S, Z, U].")
    if 0 in (*q, *k, *v) or q[2] % k[2]:
        raise ValueError(f"{shapes}: expected no empty axis, and query heads that are a multiple of key-value heads.")
    if not q_BTHQ.dtype == k_BSZQ.dtype == v_BSZU.dtype or not jnp.issubdtype(q_BTHQ.dtype, jnp.floating):
        raise ValueError(
            f"q {q_BTHQ.dtype}, k {k_BSZQ.dtype}, v {v_BSZU.dtype}: expected one floating-point dtype. Cast them."
        )
    if segments is not None and [x.shape for x in segments] != [q[:2], k[:2]]:
        raise ValueError(
            f"segments {[x.shape for x in segments]}: expected one id per query {q[:2]} and one per key {k[:2]}."
        )
    if not isinstance(q_offset, int) and (jnp.shape(q_offset) or not jnp.issubdtype(q_offset.dtype, jnp.integer)):
        raise ValueError(f"q_offset is {q_offset.dtype} {jnp.shape(q_offset)}: expected an integer.")

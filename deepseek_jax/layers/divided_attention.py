"""Causal attention of sequences that are divided over devices (`parallel.context`).

The devices send one another the entries that a cache would hold of a token: of latent attention 576 numbers, a 71st
part of its keys and values. Each device expands them itself, a chunk at a time, for each visit of one of its chunks of
queries to an earlier chunk of keys. What the visits to parts of the keys give is combined by their log-sum-exp:

    lse' = log(e^lse + e^lse_new),    o' = e^(lse - lse') o + e^(lse_new - lse') o_new

The backward pass gathers and expands again, so that between the two only the tokens of the device are kept; gradients
of the entries are summed over the devices and scattered. Memory grows with T / n tokens, but for the gathered entries
of one layer. A visit is computed by the implementation that `config.kernels.attention` names; none is masked but for
documents, and chunks that come later are not visited.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.context import Context, Visit
from pallas_kernels import mla_attention

IMPLEMENTATIONS = {name: name for name in ("chunked", "reference", "mosaic_gpu", "mosaic_tpu")} | {"xla": "chunked"}
# expand(weights, entries) -> (k_BSZQ, v_BSZU): the keys and values of some tokens
Expand = Callable[[Any, Any], tuple[jax.Array, jax.Array]]
Tree = Any


def implementation(name: str) -> str:
    """Returns the implementation of a visit that `config.kernels.attention` names. Raises UserError if it has none."""
    if name not in IMPLEMENTATIONS:
        raise UserError(
            f"config.kernels.attention={name!r} attends to whole sequences only: it gives no log-sum-exp, by which "
            f"parts are combined. Choose one of {', '.join(IMPLEMENTATIONS)}, or config.mesh.context=1."
        )
    return IMPLEMENTATIONS[name]


@jax.named_scope("attention")
def divided_attention(
    q_BTHQ: jax.Array,
    entries: Tree,
    weights: Tree,
    segments_BT: jax.Array | None,
    *,
    expand: Expand,
    context: Context,
    name: str,
    scale: float,
) -> jax.Array:
    """Attention of each token to itself and those before it in its sequence, on whichever device.

    Args:
        q_BTHQ: queries of the tokens on this device, two chunks.
        entries: what their keys and values are made of; arrays with axes B and T first.
        weights: what `expand` reads besides; both get gradients.
        segments_BT: documents of the tokens; a token sees only its own. None: all are of one.
        expand: makes keys and values of entries.
        context: the devices; more than one.
        name: `config.kernels.attention`.
        scale: factor of the scores.

    Returns o_BTHU in the dtype of the values.
    """
    call = _Call(expand, context, implementation(name), scale)

    @jax.custom_vjp
    def attend(q_BTHQ: jax.Array, entries: Tree, weights: Tree, segments_BT: jax.Array | None) -> jax.Array:
        return call.forward(q_BTHQ, entries, weights, segments_BT)[0]

    def forward(*inputs: Any) -> tuple:
        results = call.forward(*inputs)
        o_BTHU, lse_BHT = (checkpoint_name(x, tag) for x, tag in zip(results, mla_attention.SAVED, strict=True))
        return o_BTHU, (*inputs, o_BTHU, lse_BHT)

    def backward(saved: tuple, do_BTHU: jax.Array) -> tuple:
        inputs: list = [*saved, do_BTHU]
        return *call.backward(*inputs), None

    attend.defvjp(forward, backward)
    try:
        return attend(q_BTHQ, entries, weights, segments_BT)
    except ValueError as error:
        raise UserError(
            f"config.kernels.attention={name!r}: {error} In a run, config.kernels.attention=xla."
        ) from error


@dataclass(frozen=True)
class _Call:
    """What is known of a call when it is traced. Chunks of this device are stacked on a leading axis of 2."""

    expand: Expand
    context: Context
    implementation: str
    scale: float

    def forward(self, q_BTHQ: jax.Array, entries: Tree, weights: Tree, segments: Tree) -> tuple[jax.Array, jax.Array]:
        """Returns (o_BTHU, lse_BHT)."""
        q, mine = _chunks((q_BTHQ, (entries, segments)))
        o, lse = self._both(q, mine, weights)
        dtype, gathered = o.dtype, self.context.gathered(mine)

        def visit(sums: tuple, number: jax.Array) -> tuple[tuple, None]:
            at = self.context.visit(number)
            theirs, documents = self._pair(at, mine, gathered)
            k, v = self.expand(weights, theirs)
            found = self._attend(q[at.mine], k, v, documents, q.shape[2])
            return _put(sums, at.mine, _combined(_at(sums, at.mine), found)), None

        sums, _ = lax.scan(visit, (o.astype(lse.dtype), lse), jnp.arange(self.context.n_visits))
        o, lse = sums
        return _joined(o.astype(dtype), 1), _joined(lse, 2)

    def backward(
        self,
        q_BTHQ: jax.Array,
        entries: Tree,
        weights: Tree,
        segments: Tree,
        o_BTHU: jax.Array,
        lse_BHT: jax.Array,
        do_BTHU: jax.Array,
    ) -> tuple[jax.Array, Tree, Tree]:
        """Returns the gradients of queries, entries and weights."""
        wide = lse_BHT.dtype
        delta_BTH = jnp.sum(do_BTHU.astype(wide) * o_BTHU.astype(wide), axis=-1)
        of_queries = q_BTHQ, lse_BHT.swapaxes(1, 2), do_BTHU, delta_BTH
        queries, mine = _chunks((of_queries, (entries, segments)))
        dq, d_mine, d_weights = self._both_backward(queries, mine, weights, wide)
        gathered = self.context.gathered(mine)
        d_gathered = jax.tree.map(lambda x: jnp.zeros_like(x, wide), gathered[0])

        def visit(sums: tuple, number: jax.Array) -> tuple[tuple, None]:
            dq, d_gathered, d_weights = sums
            at = self.context.visit(number)
            theirs, documents = self._pair(at, mine, gathered)
            found = self._backward(_at(queries, at.mine), theirs, weights, documents, queries[0].shape[2])
            dq_found, d_theirs, d_found = found
            dq = dq.at[at.mine].add(dq_found.astype(wide))
            d_gathered = jax.tree.map(lambda s, d: s.at[at.device, at.half].add(d.astype(wide)), d_gathered, d_theirs)
            return (dq, d_gathered, _added(d_weights, d_found)), None

        sums = dq, d_gathered, d_weights
        (dq, d_gathered, d_weights), _ = lax.scan(visit, sums, jnp.arange(self.context.n_visits))
        d_entries = _joined(_added(self.context.scattered(d_gathered), d_mine), 1)
        return _like((q_BTHQ, entries, weights), (_joined(dq, 1), d_entries, d_weights))

    def _both(self, q: jax.Array, mine: tuple, weights: Tree) -> tuple[jax.Array, jax.Array]:
        """Both chunks over themselves, as one batch: (o, lse), with the leading axis."""
        q, (entries, segments) = _as_batch((q, mine))
        found = self._attend(q, *self.expand(weights, entries), _documents(segments, segments), 0)
        return _from_batch(found)

    def _both_backward(self, queries: tuple, mine: tuple, weights: Tree, wide: Any) -> tuple[jax.Array, Tree, Tree]:
        """The gradients of `_both`, in the wide dtype."""
        queries, (entries, segments) = _as_batch((queries, mine))
        found = self._backward(queries, entries, weights, _documents(segments, segments), 0)
        dq, d_mine, d_weights = jax.tree.map(lambda x: x.astype(wide), found)
        return *_from_batch((dq, d_mine)), d_weights

    def _pair(self, at: Visit, mine: tuple, gathered: tuple) -> tuple[Tree, Any]:
        """Returns (the entries that a visit looks at, the documents of its queries and keys)."""
        entries, segments = _at(_at(gathered, at.device), at.half)
        return entries, _documents(_at(mine[1], at.mine), segments)

    def _attend(self, q: jax.Array, k: jax.Array, v: jax.Array, documents: Any, q_offset: int) -> tuple:
        module = mla_attention.implementation(self.implementation)
        return module.forward(q, k, v, documents, q_offset, scale=self.scale)

    def _backward(self, queries: tuple, entries: Tree, weights: Tree, documents: Any, q_offset: int) -> tuple:
        """Returns the gradients of queries, entries and weights from one visit."""
        q_BTHQ, lse_BTH, do_BTHU, delta_BTH = queries
        module = mla_attention.implementation(self.implementation)
        (k, v), pull = jax.vjp(self.expand, weights, entries)
        rest = lse_BTH.swapaxes(1, 2), do_BTHU, delta_BTH.swapaxes(1, 2)
        dq_BTHQ, dk, dv = module.backward(q_BTHQ, k, v, documents, q_offset, *rest, scale=self.scale)
        d_weights, d_entries = pull((dk, dv))
        return dq_BTHQ, d_entries, d_weights


def _combined(one: tuple[jax.Array, jax.Array], other: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """(o_BTHU, lse_BHT) over two parts of the keys from those over each; the first holds each query's own."""
    (o_BTHU, lse_BHT), (new_BTHU, new_BHT) = one, other
    both_BHT = jnp.logaddexp(lse_BHT, new_BHT)
    fade, add = (jnp.exp(part - both_BHT).swapaxes(1, 2)[..., None] for part in (lse_BHT, new_BHT))
    return fade * o_BTHU + add * new_BTHU.astype(o_BTHU.dtype), both_BHT


def _documents(of_queries: jax.Array | None, of_keys: jax.Array | None) -> Any:
    """Documents as the implementations take them, int32."""
    if of_queries is None or of_keys is None:
        return None
    return of_queries.astype(jnp.int32), of_keys.astype(jnp.int32)


def _chunks(tree: Tree) -> Tree:
    """[B, T, ...] -> [2, B, T / 2, ...]."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0], 2, -1, *x.shape[2:]).swapaxes(0, 1), tree)


def _joined(tree: Tree, axis: int) -> Tree:
    """The inverse of `_chunks`, where tokens are axis `axis` of a chunk."""
    return jax.tree.map(lambda x: jnp.concatenate([x[0], x[1]], axis), tree)


def _as_batch(tree: Tree) -> Tree:
    """[2, B, ...] -> [2 B, ...]."""
    return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), tree)


def _from_batch(tree: Tree) -> Tree:
    """The inverse of `_as_batch`."""
    return jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), tree)


def _at(tree: Tree, i: jax.Array) -> Tree:
    return jax.tree.map(lambda x: lax.dynamic_index_in_dim(x, i, keepdims=False), tree)


def _put(tree: Tree, i: jax.Array, values: Tree) -> Tree:
    return jax.tree.map(lambda x, value: lax.dynamic_update_index_in_dim(x, value, i, 0), tree, values)


def _added(sums: Tree, more: Tree) -> Tree:
    return jax.tree.map(lambda x, y: x + y.astype(x.dtype), sums, more)


def _like(tree: Tree, values: Tree) -> Tree:
    return jax.tree.map(lambda x, value: value.astype(x.dtype), tree, values)

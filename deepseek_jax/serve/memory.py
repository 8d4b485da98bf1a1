"""What the engine keeps of tokens on the device, all of it in pages: caches, and the tokens themselves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.layers.cache import first_pass, write_pages
from deepseek_jax.layers.decoder import Cache
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.replicas import Replicas


class Memory(NamedTuple):
    """Pages, then their places. Entry i of `ahead` is made from token i + 1 too: see `speculation`."""

    cache: Cache  # of the model's blocks
    ids_PS: jax.Array  # the tokens
    ahead: Any = None  # the cache of multi-token prediction, if it makes drafts

    def written(self, cache: Cache, tokens: Tokens, table_BN: jax.Array) -> "Memory":
        """The memory with these tokens, whose entries are in `cache` already."""
        return self._replace(cache=cache, ids_PS=write_pages(self.ids_PS, tokens.ids_BT, tokens, table_BN))


def memory_of(model: Any, n_pages: int, page_size: int, has_drafts: bool, replicas: Replicas | None = None) -> Memory:
    """Returns memory for `n_pages` pages per device, all zeros."""

    def shapes(n_pages: int) -> Memory:
        ids_PS: Any = jax.ShapeDtypeStruct((n_pages, page_size), jnp.int32)
        cache = jax.eval_shape(lambda: model.pool(n_pages, page_size))
        return Memory(cache, ids_PS, _ahead(model, n_pages, page_size) if has_drafts else None)

    one = shapes(n_pages)
    if replicas:
        return replicas.zeros(one, shapes(n_pages * replicas.n))
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)


def _ahead(model: Any, n_pages: int, page_size: int) -> Any:
    """The shapes of what multi-token prediction keeps of tokens."""
    h_BTD = jax.ShapeDtypeStruct((n_pages, 1, model.embedding.table_VD.shape[1]), model.run.compute)
    ids_BT = jax.ShapeDtypeStruct((n_pages, 1), jnp.int32)

    def first(h_BTD: jax.Array, ids_BT: jax.Array) -> Any:
        return model.ahead(h_BTD, Tokens.of(ids_BT), first_pass(page_size))[1]

    return jax.eval_shape(first, h_BTD, ids_BT)

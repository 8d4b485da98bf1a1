"""What the engine keeps of tokens on the device, all of it in pages: caches, and the tokens themselves."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.layers.cache import first_pass, write_pages
from deepseek_jax.layers.decoder import Cache
from deepseek_jax.layers.tokens import Tokens


class Memory(NamedTuple):
    """Pages, then their places. Entry i of `ahead` is made from token i + 1 too: see `speculation`."""

    cache: Cache  # of the model's blocks
    ids_PS: jax.Array  # the tokens
    ahead: Any = None  # the cache of multi-token prediction, if it makes drafts

    @classmethod
    def of(cls, model: Any, n_pages: int, page_size: int, has_drafts: bool) -> "Memory":
        """Memory for `n_pages` pages, all zeros."""
        return cls(
            model.pool(n_pages, page_size),
            jnp.zeros((n_pages, page_size), jnp.int32),
            _ahead(model, n_pages, page_size) if has_drafts else None,
        )

    def written(self, cache: Cache, tokens: Tokens, table_BN: jax.Array) -> "Memory":
        """The memory with these tokens, whose entries are in `cache` already."""
        return self._replace(cache=cache, ids_PS=write_pages(self.ids_PS, tokens.ids_BT, tokens, table_BN))


def _ahead(model: Any, n_pages: int, page_size: int) -> Any:
    h_BTD = jax.ShapeDtypeStruct((n_pages, 1, model.embedding.table_VD.shape[1]), model.run.compute)
    tokens = Tokens.of(jnp.zeros((n_pages, 1), jnp.int32))
    _, kept = jax.eval_shape(lambda h_BTD: model.ahead(h_BTD, tokens, first_pass(page_size)), h_BTD)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), kept)

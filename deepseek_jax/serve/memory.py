"""What the engine keeps of tokens on the device, in pages: caches, and the tokens themselves.

Attentions that keep a window (`layers.block.Attention.has_rows`) have a row for each running request besides.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.errors import UserError
from deepseek_jax.layers.block import Attend, Statistics
from deepseek_jax.layers.cache import first_pass, in_rows, read_pages, write_pages
from deepseek_jax.layers.decoder import Cache
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.parallel.replicas import Replicas
from deepseek_jax.serve.pages import PAGE_SIZE


class Sizes(NamedTuple):
    """What an engine's arrays depend on besides its model; pages and rows are those of each device."""

    n_pages: int
    page_size: int
    n_rows: int
    has_drafts: bool


class Memory(NamedTuple):
    """Pages, then their places. Entry i of `ahead` is made from token i + 1 too: see `speculation`."""

    cache: Cache  # of the model's blocks
    ids_PS: jax.Array  # the tokens
    ahead: Any = None  # the cache of multi-token prediction, if it makes drafts


def read(model: Any, tokens: Tokens, attend: Attend, memory: Memory, table_BN: jax.Array) -> tuple[jax.Array, Memory]:
    """Runs the model on tokens, whose entries go to pages: (h_BTD after the final norm, memory).

    With drafts the first is what these are made from, as `Decoder.ahead_of` gives it.
    """

    def note(routes: jax.Array | None, statistics: Statistics) -> jax.Array | None:
        return routes if routes is None else write_pages(routes, statistics.routes_BTK, tokens, table_BN)

    noting = note if model.run.routes else None
    for_drafts = memory.ahead is not None
    h_BTD, cache = model.generating(tokens, attend, memory.cache, noting, in_stack=True, for_drafts=for_drafts)
    ids_PS = write_pages(memory.ids_PS, tokens.ids_BT, tokens, table_BN)
    return h_BTD, memory._replace(cache=cache, ids_PS=ids_PS)


def routes_of(model: Any, memory: Memory, table_BN: jax.Array) -> jax.Array:
    """routes_BSLK: the experts of all tokens in the rows' pages, layer by layer, where these were noted."""
    pairs = [memory.cache[name] for name in model.stacks]
    noted = [pair[1] for pair in pairs] if model.run.unroll else [one for layers in pairs for _, one in layers]
    return jnp.concatenate([_of_rows(array, table_BN) for array in noted if array is not None], axis=2)


def _of_rows(noted: jax.Array, table_BN: jax.Array) -> jax.Array:
    """Pages of one layer, [P, S, K], or of a stack of them, [L, P, S, K], as axes B, S, L and K."""
    if noted.ndim == 3:
        noted = noted[None]
    return jnp.moveaxis(jax.vmap(lambda a: read_pages(a, table_BN))(noted), 0, 2)


def shapes_of(model: Any, sizes: Sizes) -> Memory:
    """Returns the shapes of memory."""
    n_pages, page_size = sizes.n_pages, sizes.page_size
    ids_PS: Any = jax.ShapeDtypeStruct((n_pages, page_size), jnp.int32)
    cache = jax.eval_shape(lambda: model.pool(n_pages, page_size, sizes.n_rows + 1))
    if model.run.routes:
        cache = _with_routes(model, cache, n_pages, page_size)
    return Memory(cache, ids_PS, _ahead(model, sizes) if sizes.has_drafts else None)


def page_size_for(model: Any, page_size: int | None) -> int:
    """Returns the tokens per page: those given, or the fewest from `PAGE_SIZE` on that suit the model.

    Raises UserError for a number that does not.
    """
    multiple = math.lcm(*(attention.page_multiple for attention in model.attentions))
    if page_size is None:
        return math.lcm(PAGE_SIZE, multiple)
    if page_size % multiple:
        raise UserError(
            f"page_size={page_size}: the model has entries of up to {multiple} tokens, which pages must not divide. "
            f"Choose a multiple of {multiple}."
        )
    return page_size


def zeros(one: Memory, all_of_them: Memory, replicas: Replicas | None) -> Memory:
    """Returns memory, all zeros, of the shapes `all_of_them`, those of `one` device being `one`."""
    if replicas:
        return replicas.zeros(one, all_of_them)
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), one)


def _with_routes(model: Any, cache: Cache, n_pages: int, page_size: int) -> Cache:
    """The shapes of a cache with those of the experts that each block's tokens chose: a pair per block."""
    ids_BT = jax.ShapeDtypeStruct((n_pages, page_size), jnp.int32)
    _, statistics = jax.eval_shape(lambda ids_BT: model.hidden(Tokens.of(ids_BT)), ids_BT)
    found: Cache = {}
    for name, kept in cache.items():
        routes = statistics[name].routes_BTK  # with the layers first
        layer = None if routes is None else jax.ShapeDtypeStruct(routes.shape[1:], routes.dtype)
        found[name] = (kept, routes) if model.run.unroll else tuple((one, layer) for one in kept)
    return found


def _ahead(model: Any, sizes: Sizes) -> Any:
    """The shapes of what multi-token prediction keeps of tokens."""
    h_BTD = jax.ShapeDtypeStruct((sizes.n_pages, 1, *model.ahead_shape), model.run.compute)
    ids_BT = jax.ShapeDtypeStruct((sizes.n_pages, 1), jnp.int32)

    def first(h_BTD: jax.Array, ids_BT: jax.Array) -> Any:
        return model.ahead(h_BTD, Tokens.of(ids_BT), first_pass(sizes.page_size))[1]

    return in_rows(jax.eval_shape(first, h_BTD, ids_BT), sizes.n_rows + 1)

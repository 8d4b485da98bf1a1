"""How a part declares its weights, and how identical blocks are stacked and run.

A weight is declared once, with its shape, its logical axes and its initialiser; sharding, checkpoint layout and counts
follow from that. Modules describe; what crosses `jax.jit` is a plain nested dict of arrays:

    definition, params, router_bias = split(V3(config, rngs=nnx.Rngs(0)))
    model = bind(definition, params, router_bias)      # inside jit, grad, scan or shard_map

All layers are made from their sizes (`d_model` is D, the width of the residual stream; `std` the standard deviation of
initial weights), what they are composed of, `run` or its `matmul`, and `rngs`, the source of the initialisers' keys.
"""

import functools
import operator
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deepseek_jax.kernels import XLA, Kernels
from deepseek_jax.parallel.alltoall import Exchange
from deepseek_jax.parallel.context import CONTEXT, Context
from deepseek_jax.parallel.context import WHOLE as WHOLE_SEQUENCES
from deepseek_jax.parallel.mesh import AnyMesh
from deepseek_jax.parallel.sharding import EXPERTS, STACKED, Placement
from deepseek_jax.parallel.vocabulary import WHOLE, Vocabulary
from deepseek_jax.precision.coded import CodedWeight
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.precision.grouped import OfLayer, layer_of
from deepseek_jax.precision.matmul import PLAIN, Matmul
from pallas_kernels.mla_attention import SAVED

Tree = dict  # a nested dict with arrays (or one value per array) as leaves
Unshard = Callable[..., None]  # (module, stacks=False); see `parallel.sharding.unsharder`
Fetch = tuple[int, Callable[[Any, jax.Array], Any]]  # L; (this rank's weights, number of the layer) -> its weights


class Given(functools.partial):
    """A function with some of its arguments, equal to another of the same: so networks of the same sizes are equal."""

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Given) and self._parts == other._parts

    def __hash__(self) -> int:
        return hash(self._parts)

    @property
    def _parts(self) -> tuple:
        return self.func, self.args, tuple(sorted(self.keywords.items()))


class RouterBias(nnx.Variable):
    """A weight that no gradient moves: the balancing bias of a router (V3 section 2.1.2)."""


class ExpertTable(RouterBias):
    """The experts of each token id: numbers that nothing moves (`layers.router.HashRouter`)."""


class ReplicaSlots(RouterBias):
    """Where the replicas of each expert are: numbers that no gradient moves either (`train.redundant`)."""


@dataclass(frozen=True)
class Execution:
    """How a model runs; none of it changes what the model computes, but for rounding."""

    compute: DTypeLike = jnp.float32  # dtype of the activations
    # what is kept for the backward pass: "none" keeps all, "dots" the matmul outputs, "block" block inputs
    remat: str = "none"
    # stacked layers that one turn of the loop over layers runs; more compile longer and copy less; 0: no loop at all,
    # so that a pipeline can divide the backward pass of each layer, and a GPU that decodes copies no weights of a layer
    unroll: int = 1
    matmul: Matmul = PLAIN  # multiplies activations with weights
    kernels: Kernels = XLA  # the implementation of each operation that has several
    # how tokens reach the devices of their experts (`parallel.alltoall`); None when all experts are here
    exchange: Exchange | None = None
    # gathers, in place, the weights of a module that are stored in shards (FSDP); None when all are whole
    unshard: Unshard | None = None
    # adds, in place, what the adapters of a layer have learnt to its weights (`layers.lora`); None without adapters
    adapt: Unshard | None = None
    # of a stack whose layers are split over a pipeline's ranks: (number of layers, function that gathers one of them)
    fetch: Callable[[str], Fetch] | None = None
    vocabulary: Vocabulary = WHOLE  # which ids' rows of the embedding and columns of the head are here
    context: Context = WHOLE_SEQUENCES  # the devices over which each sequence is divided
    cache: str = "full"  # what generation keeps of latents: "full", in the dtype of the activations, or "fp8"
    routes: bool = False  # whether blocks report the experts that each token chose
    # whether indexers are left out where attention is dense and nobody learns from them (V4's first stages)
    index_rests: bool = False
    redundant: int = 0  # replicas of routed experts, beside one of each (`parallel.eplb`); not for training


SINGLE_DEVICE = Execution()  # float32 on one device


# What a weight is for. The planner, weight decay and number formats read this, never a part of a name.
ROLES = (
    "attention_in",  # matrices of attention to queries, keys, values and latents
    "attention_out",  # and back to the stream
    "grouped_out",  # of the heads of a group to that group's part of a latent, on the way back
    "compressor",  # makes one entry of several tokens
    "gate",  # matrices of feed-forwards
    "up",
    "down",
    "router",  # scores experts
    "index",  # weighs the heads of an indexer
    "mixing",  # weighs the streams of hyper-connections
    "join",  # joins the inputs of multi-token prediction
    "table",  # rows read by token id
    "head",  # makes logits
    "gain",  # one number per number of an activation
    "bias",
    "adapter",  # thin matrices of low-rank adapters
)
MULTIPLIED = ("attention_in", "attention_out", "gate", "up", "down", "join")  # by a `Matmul`; no other code reads them
CONVERTED = ("table", "head", "grouped_out", "compressor")  # to the dtype of the activations, where they are read
CODED_BLOCK = 128  # rows and columns of a weight that share a scale in FP8
SPARED = ("gain", "bias")  # by weight decay
BY_ADAMW = (*SPARED, "table", "head", "adapter")  # also where Muon updates all others (`train.optimizers.muon`)


_shapes_alone: ContextVar[bool] = ContextVar("shapes_alone", default=False)


@contextmanager
def shapes_alone() -> Iterator[None]:
    """Within it, no initialiser is traced: a weight is zeros, of which `nnx.eval_shape` keeps the shape and dtype."""
    token = _shapes_alone.set(True)
    try:
        yield
    finally:
        _shapes_alone.reset(token)


def param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Callable, *, role: str
) -> nnx.Param:
    """Declares a float32 weight.

    Args:
        rngs: source of the initialiser's key.
        shape: sizes, one per letter of the weight's suffix.
        axes: logical axis of each dimension ("embed", "heads", "experts", …); None for one that is never split.
        init: `init(key, shape, dtype)`.
        role: one of `ROLES`.
    """
    if len(shape) != len(axes):
        raise ValueError(f"a weight of shape {shape} needs {len(shape)} logical axes, got {axes}")
    if role not in ROLES:
        raise ValueError(f"role={role!r}: unknown. Choose one of {', '.join(ROLES)}.")
    value = jnp.zeros(shape, jnp.float32) if _shapes_alone.get() else init(next_key(rngs), shape, jnp.float32)
    return nnx.Param(value, axes=axes, role=role)


class _Ahead(NamedTuple):
    """Keys of a stream that are made together, from `counter` on, and how many of them have been given out."""

    key: jax.Array
    counter: jax.Array
    keys: jax.Array
    n_used: int


N_AHEAD = 32  # keys that are made together
_ahead: weakref.WeakKeyDictionary[nnx.RngStream, _Ahead] = weakref.WeakKeyDictionary()


def next_key(rngs: nnx.Rngs) -> jax.Array:
    """Returns what `rngs.params()` returns, key by key the same (with JAX's default generator, and rbg).

    Each of Flax's keys is a loop of its own in the program: those of a model's weights took a third of the time in
    which its initialiser is compiled. Here one loop makes many.
    """
    stream = rngs.params
    key, count = stream.key.get_raw_value(), stream.count.get_raw_value()
    found = _ahead.get(stream)
    if found is None or found.key is not key or found.counter is not count or found.n_used == N_AHEAD:
        counts = count + jnp.arange(N_AHEAD, dtype=jnp.uint32)
        found = _Ahead(key, count, jax.vmap(jax.random.fold_in, (None, 0))(key, counts), 0)
    stream.count.set_value(count + 1)
    _ahead[stream] = found._replace(counter=stream.count.get_raw_value(), n_used=found.n_used + 1)
    return jax.lax.index_in_dim(found.keys, found.n_used, keepdims=False)


def variables(module: nnx.Module) -> Iterator[tuple[tuple, nnx.Variable]]:
    """The (path, variable) pairs of a module."""
    return ((path, leaf) for path, leaf in nnx.iter_graph(module) if isinstance(leaf, nnx.Variable))


def stack(build: Callable[[nnx.Rngs], nnx.Module], n: int, rngs: nnx.Rngs) -> nnx.Module:
    """`n` modules made by `build`, as one module whose weights have a leading axis L = n (logical axis "layers").

    Stacked blocks compile once instead of `n` times.
    """

    @nnx.split_rngs(splits=n)
    @nnx.vmap(in_axes=(nnx.StateAxes({...: 0}),), out_axes=0)  # type: ignore[arg-type]  # its own documented form
    def create(layer_rngs: nnx.Rngs) -> nnx.Module:
        return build(layer_rngs)

    module = create(rngs)
    for _, variable in variables(module):
        variable.set_metadata(axes=("layers", *variable.get_metadata("axes")))
    return module


def run_stack(
    blocks: nnx.Module,
    x: jax.Array,
    run: Execution,
    call: Callable,
    extras: Any = None,
    layers: slice | None = None,
    fetch: Fetch | None = None,
) -> tuple[Any, Any]:
    """Runs stacked blocks one after the other: for each layer, `x, y = call(block, x, extra)`.

    Args:
        blocks: made by `stack`.
        x: what flows from block to block (any pytree).
        run: its `remat`, `unshard` and `adapt` apply to each block.
        call: what one block does; `extra` is the layer's slice of `extras`.
        extras: arrays with a leading axis L (of the layers that run), or None.
        layers: those that run; None: all.
        fetch: where the weights of the stack come from if other devices hold some; see `Execution`.

    Returns the last `x`, and the `y` of all layers stacked on a leading axis L.
    """
    definition, weights = nnx.split(blocks)
    if layers is not None:
        weights = _layers_of(weights, layers)

    def body(x: Any, layer: tuple) -> tuple[Any, Any]:
        own, extra = layer
        block = nnx.merge(definition, fetch[1](weights, own) if fetch else own)
        if run.unshard:
            run.unshard(block)
        if run.adapt:
            run.adapt(block)
        return call(block, x, extra)

    rows = jnp.arange(fetch[0]) if fetch else weights
    if run.unroll:
        return jax.lax.scan(remat(body, run.remat), x, (rows, extras), unroll=run.unroll)
    found = []
    for i in range(fetch[0] if fetch else _depth(weights)):
        own = rows[i] if fetch else _layers_of(weights, i)
        x, y = body(x, (own, jax.tree.map(lambda a, i=i: a[i], extras)))
        found.append(y)
    return x, jax.tree.map(lambda *ys: jnp.stack(ys), *found)


@functools.partial(jax.tree_util.register_dataclass, data_fields=["array"], meta_fields=["order"])
@dataclass(frozen=True)
class Turned:
    """A weight that lies in memory with its axes in another order; modules read it with its own: weight[...]."""

    array: jax.Array
    order: tuple[int, ...]  # which of the weight's axes each axis of the array is

    @property
    def ndim(self) -> int:
        """Of the weight."""
        return len(self.order)

    def __getitem__(self, index: Any) -> jax.Array:
        assert index is ..., index
        return jnp.transpose(self.array, sorted(range(len(self.order)), key=self.order.__getitem__))


class Unstacked(NamedTuple):
    """A stacked weight as one array per layer: without a loop, XLA on a GPU copies what it cuts out of a stack."""

    layers: tuple[jax.Array | Turned | Fp8Weight | CodedWeight, ...]

    @property
    def ndim(self) -> int:
        """Of the stack."""
        return 1 + self.layers[0].ndim

    def __getitem__(self, index: Any) -> "Unstacked":  # type: ignore[override]  # modules read weights as weight[...]
        assert index is ..., index
        return self


class InStack(NamedTuple):
    """What one layer keeps, left where it is in an array of all layers: cut out of it, it would be copied."""

    stack: jax.Array  # with a leading axis L
    number: jax.Array  # of the layer


def is_in_stack(x: Any) -> bool:
    """Whether this is an `InStack`, which is a leaf of what layers keep."""
    return isinstance(x, InStack)


def unstacked(layers: Tree) -> Tree:
    """The weights of a stack, each `Unstacked`, from those of its layers by their numbers "0", "1", …."""
    in_order = (layers[str(number)] for number in range(len(layers)))
    return jax.tree.map(lambda *each: Unstacked(each), *in_order, is_leaf=lambda sub: not isinstance(sub, dict))


def take_apart(model: nnx.Module) -> None:
    """Makes stacked weights `Unstacked`, in place; inside `jit`. Those of routed experts are found where they lie."""
    for _, weight in variables(model):
        if weight.get_metadata("axes")[:1] == ("layers",) and weight.get_metadata("axes")[1:2] != ("experts",):
            layers = range(jax.tree.leaves(weight[...])[0].shape[0])
            weight.set_value(Unstacked(tuple(jax.tree.map(operator.itemgetter(n), weight[...]) for n in layers)))


def as_layer(block: nnx.Module, matmul: Matmul) -> nnx.Module:
    """Returns a block for generation outside a stack: its routed experts as in a stack of one layer, so not copied."""

    def own(_: tuple, weight: nnx.Variable) -> nnx.Variable:
        if not matmul.finds_layer or weight.get_metadata("axes")[:1] != ("experts",):
            return weight
        return weight.replace(OfLayer(jax.tree.map(lambda a: a[None], weight[...]), 0))

    definition, weights = nnx.split(block)
    return nnx.merge(definition, nnx.map_state(own, weights))


def _layers_of(weights: nnx.State, index: int | slice) -> nnx.State:
    """Some layers of stacked weights, or the weights of one."""

    def of(_: tuple, weight: nnx.Variable) -> nnx.Variable:
        value = weight[...]
        if not isinstance(value, Unstacked):
            return weight.replace(jax.tree.map(lambda a: a[index], value))
        found = value.layers[index]
        return weight.replace(Unstacked(found) if isinstance(index, slice) else found)

    return nnx.map_state(of, weights)


def _depth(weights: nnx.State) -> int:
    """The number of layers of stacked weights."""
    value = jax.tree.leaves(weights, is_leaf=lambda v: isinstance(v, nnx.Variable))[0][...]
    return len(value.layers) if isinstance(value, Unstacked) else len(jax.tree.leaves(value)[0])


def run_cached(
    blocks: nnx.Module, x: jax.Array, run: Execution, call: Callable, cache: Any = None, *, in_stack: bool = False
) -> tuple[jax.Array, Any]:
    """Runs stacked blocks that generate: for each layer, `x, kept = call(block, x, cached)`.

    The cache of all layers is carried through the loop and each layer's entry is written where it was, so that XLA
    copies no cache of more than one layer, or none with `in_stack` (shown on a CPU). Weights of routed experts are not
    cut out of the stack either: those that a product reads are found in it (`precision.grouped.OfLayer`). Without a
    loop weights may be `Unstacked`; what a layer does is traced once all the same.

    Args:
        blocks: made by `stack`.
        x: what flows from block to block.
        run: its `unroll` decides whether there is a loop; its `adapt` applies to each block.
        call: what one block does.
        cache: what the layers kept before, as this function returns it; None before the first pass.
        in_stack: whether `call` takes and returns arrays of a loop as `InStack`.

    Returns (the last `x`, what the layers keep: arrays with a leading axis L; without a loop, a tuple of layers).
    """
    definition, weights = nnx.split(blocks)
    values = {path: weight[...] for path, weight in variables(blocks)}
    routed = {path for path, weight in variables(blocks) if weight.get_metadata("axes")[1:2] == ("experts",)}
    apart = {path for path, value in values.items() if isinstance(value, Unstacked)}
    n_layers = next(len(v.layers) if isinstance(v, Unstacked) else v.shape[0] for v in values.values())

    def layer(x: jax.Array, number: jax.Array, given: nnx.State, cached: Any) -> tuple[jax.Array, Any]:
        def own(path: tuple, weight: nnx.Variable) -> nnx.Variable:
            if path in apart:
                return weight
            is_found = path in routed and run.matmul.finds_layer
            return weight.replace((OfLayer if is_found else layer_of)(weight[...], number))

        block = nnx.merge(definition, nnx.map_state(own, given))
        if run.adapt:
            run.adapt(block)
        return call(block, x, cached)

    def first(x: jax.Array, number: jax.Array) -> tuple[jax.Array, Any]:
        return layer(x, number, weights, None)

    def next_one(carry: tuple, number: jax.Array) -> tuple[tuple, None]:
        x, cache = carry
        if in_stack:
            x, kept = layer(x, number, weights, jax.tree.map(lambda stack: InStack(stack, number), cache))
            return (x, jax.tree.map(lambda one: one.stack, kept, is_leaf=is_in_stack)), None
        x, kept = layer(x, number, weights, jax.tree.map(lambda c: layer_of(c, number), cache))
        put = functools.partial(jax.lax.dynamic_update_index_in_dim, index=number, axis=0)
        return (x, jax.tree.map(put, cache, kept)), None

    if run.unroll and cache is None:
        return jax.lax.scan(first, x, jnp.arange(n_layers))
    if run.unroll:
        return jax.lax.scan(next_one, (x, cache), jnp.arange(n_layers))[0]
    lowered_once, every = jax.jit(layer), []
    for number in range(n_layers):
        given = nnx.map_state(functools.partial(_taken_out, number), weights)
        x, kept = lowered_once(x, jnp.int32(number), given, cache and cache[number])
        every.append(kept)
    return x, tuple(every)


def _taken_out(number: int, path: tuple, weight: nnx.Variable) -> nnx.Variable:
    """One layer's weight where those of all layers are arrays of their own, else the stack."""
    value = weight[...]
    return weight.replace(value.layers[number]) if isinstance(value, Unstacked) else weight


REMAT = ("none", "dots", "block")
# of "dots": results of matmuls with weights, and of attention that computes its scores again by itself
KEPT_DOTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.dots_with_no_batch_dims_saveable, jax.checkpoint_policies.save_only_these_names(*SAVED)
)


def remat(body: Callable, policy: str) -> Callable:
    """`body`, recomputed in the backward pass as `policy` says (see `Execution.remat`)."""
    if policy == "none":
        return body
    if policy == "dots":
        return jax.checkpoint(body, policy=KEPT_DOTS)
    if policy == "block":
        return jax.checkpoint(body)
    raise ValueError(f"remat={policy!r}: no such policy. Choose one of {', '.join(REMAT)}.")


def split(module: nnx.Module) -> tuple[nnx.GraphDef, Tree, Tree]:
    """A module as (definition, trained weights, router biases), the last two plain nested dicts with string keys."""
    definition, params, router_bias = nnx.split(module, nnx.Param, RouterBias)  # type: ignore[misc]  # three parts
    return definition, _named(nnx.to_pure_dict(params)), _named(nnx.to_pure_dict(router_bias))


def bind(definition: nnx.GraphDef, params: Tree, router_bias: Tree) -> nnx.Module:
    """The module described by `definition` with these weights: the inverse of `split`."""
    return nnx.merge(definition, nnx.State(_indexed(params)), nnx.State(_indexed(router_bias)))


def logical_axes(module: nnx.Module) -> tuple[Tree, Tree]:
    """The logical axes of a module's trained weights and router biases, in trees like those of `split`."""
    return _metadata(module, nnx.Param, "axes"), _metadata(module, RouterBias, "axes")


def roles(module: nnx.Module) -> Tree:
    """The role of each of a module's trained weights, as declared."""
    return _metadata(module, nnx.Param, "role")


def dtype_read(role: str, weights: DTypeLike, compute: DTypeLike) -> DTypeLike:
    """The dtype in which a step reads a weight.

    That is `weights` for what a `Matmul` multiplies, `compute` (the activations' dtype) for what is `CONVERTED`, and
    float32 for all others.
    """
    return weights if role in MULTIPLIED else compute if role in CONVERTED else jnp.float32


def matrix_axes(axes: tuple[str | None, ...]) -> tuple[int, int]:
    """(axes of a stack of matrices, axes that are contracted) of a weight that a `Matmul` multiplies.

    Its output is the residual stream if the last axis is "embed"; otherwise all axes of the matrix but the first.
    """
    n_stacked = sum(axis in STACKED for axis in axes)
    return n_stacked, len(axes) - n_stacked - 1 if axes[-1:] == ("embed",) else 1


def in_codes(axes: tuple, shape: tuple[int, ...], role: str, place: Placement, mesh: AnyMesh) -> bool:
    """Whether a precision whose products read codes gathers this weight in codes: if several devices keep parts of it.

    Not gates of experts whose width is not a multiple of 128, which share blocks where gate and up lie side by side,
    and not with divided sequences, whose attention computes gradients of weights by itself: these are quantised where
    they are used.
    """
    shares_blocks = EXPERTS in axes and role in ("gate", "up") and shape[-1] % CODED_BLOCK
    is_cut = place.zero_dim is not None and not place.is_sharded
    return role in MULTIPLIED and is_cut and mesh.shape[CONTEXT] == 1 and not shares_blocks


def decayed(module: nnx.Module) -> Tree:
    """Which of a module's trained weights weight decay shrinks, by their roles: a tree of bools."""
    return jax.tree.map(lambda role: role not in SPARED, roles(module))


def _metadata(module: nnx.Module, kind: type, key: str) -> Tree:
    """What the variables of a kind were declared with under `key`, in a tree like those of `split`."""
    return _named(nnx.to_pure_dict(nnx.map_state(lambda _, v: v.get_metadata(key), nnx.state(module, kind))))


def _named(tree: Tree) -> Tree:
    """List indices as strings, so that every key of a tree is a name."""
    return {str(key): _named(sub) if isinstance(sub, dict) else sub for key, sub in tree.items()}


def _indexed(tree: Tree) -> Tree:
    """The inverse of `_named`."""
    names = ((int(key) if key.isdigit() else key, sub) for key, sub in tree.items())
    return {key: _indexed(sub) if isinstance(sub, dict) else sub for key, sub in names}

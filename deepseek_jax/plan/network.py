"""A network as the planner sees it: shapes and logical axes of its weights, and a few numbers of its family.

Everything comes from the abstract model, so every family can be planned and no array is created.
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from deepseek_jax.abstract_model import abstract
from deepseek_jax.layers.base import SPARED, Execution, bind, logical_axes, matrix_axes, roles, split
from deepseek_jax.layers.block import Group
from deepseek_jax.layers.decoder import Decoder
from deepseek_jax.parallel.sharding import EXPERTS, LAYERS, is_axes
from deepseek_jax.tree import dotted, size

EMBEDDING, HEAD, MTP = "embedding", "head", "mtp"  # top-level entries of a model, besides blocks and a norm
NORM_WIDTH = "embed"
# matrices that FP8 recipes keep in high precision (V3 section 3.3.1; V4's released code)
HIGH_PRECISION = ("head", "router", "index", "mixing", "grouped_out", "compressor")
LATENTS = ("q_latent", "kv_latent")
BF16 = Execution(compute=jnp.bfloat16)
INDEXER = ".indexer."  # in the names of its weights
LONG = 2**20  # tokens of a sequence whose cache is measured


class Sizes(Protocol):
    """A family's `Config`, as far as the planner reads it; its routed experts, if any, are in `experts`."""

    d_model: int
    vocab_size: int

    def __hash__(self) -> int: ...


@dataclass(frozen=True)
class Weight:
    """One weight."""

    name: str  # dotted, as in a checkpoint
    shape: tuple[int, ...]  # including the leading axis of a stack
    axes: tuple[str | None, ...]  # logical ones, likewise
    role: str  # what it is for (`layers.base.ROLES`)
    is_idle: bool = False  # whether no step reads it: an indexer's that rests

    @functools.cached_property
    def part(self) -> str:
        """The top-level entry it belongs to."""
        return self.name.partition(".")[0]

    @property
    def repeats(self) -> int:
        """How often it is stacked; 1 for a weight that is not stacked."""
        return self.shape[0] if self.is_stacked else 1

    @property
    def size(self) -> int:
        """How many numbers it has, over all repeats."""
        return math.prod(self.shape)

    @property
    def is_stacked(self) -> bool:
        """Whether it has a leading axis of layers."""
        return self.axes[:1] == (LAYERS,)

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to the routed experts."""
        return EXPERTS in self.axes

    @property
    def is_matrix(self) -> bool:
        """Whether activations are multiplied by it: not a gain, a bias, the embedding (a table) or an idle one."""
        return self.role not in (*SPARED, "table") and not self.is_idle

    @property
    def reads_latent(self) -> bool:
        """Whether its input is a latent of attention, from which V3 recomputes its output (section 3.2.3)."""
        return self.is_matrix and self._inner()[0][0] in LATENTS

    @property
    def widths(self) -> tuple[int, int]:
        """(width of its input, width of its output), for one layer and one expert.

        The output is the residual stream if the last axis is "embed", otherwise all axes but the first.
        """
        n_stacked, n_contracted = matrix_axes(self.axes)
        inner = self.shape[n_stacked:]
        return math.prod(inner[:n_contracted]), math.prod(inner[n_contracted:])

    @property
    def absorbed_widths(self) -> tuple[int, int]:
        """The same of one that `expands`, per head: it moves queries into the latent space, or sums of latents out."""
        n_stacked, _ = matrix_axes(self.axes)
        latent, heads, width = self.shape[n_stacked:]
        return heads * width, heads * latent

    @property
    def expands(self) -> bool:
        """Whether keys or values are made with it of the entries of a cache."""
        return self.is_matrix and self._inner()[0][0] == "kv_latent"

    def repeated(self, n: int) -> "Weight":
        """Returns the same weight, stacked `n` times; itself if it is not stacked."""
        return replace(self, shape=(n, *self.shape[1:])) if self.is_stacked else self

    def _inner(self) -> list[tuple[str | None, int]]:
        pairs = zip(self.axes, self.shape, strict=True)
        return [(axis, n) for axis, n in pairs if axis not in (LAYERS, EXPERTS)]


@dataclass(frozen=True)
class Reading:
    """What the attention of one layer reads per token."""

    flops_per_pair: int  # operations of one token's queries with the keys and values of one other token
    flops_per_slot: int  # the same of a new token and one in the cache
    most_keys: int | None  # keys that one attends to at most, chosen by an indexer; None: all before it
    flops_per_index: int  # operations of an indexer on a token and a key; 0 without
    tokens_per_key: int = 1  # tokens that a key stands for
    window: int = 0  # tokens that one attends to besides, the last ones
    gathers_chosen: bool = False  # whether queries of divided sequences gather the entries of the chosen keys
    # numbers per token that divided sequences gather, in the dtype of the activations and in float32, where all layers
    # attend to what is gathered as it is; None: the entries
    gathered: tuple[int, int] | None = None

    def gathers(self, seq_len: int) -> bool:
        """Returns whether they do so in sequences of `seq_len`: where there is a choice, or never anything else."""
        has_choice = self.gathers_chosen and self.most_keys is not None and seq_len > self.most_keys
        return has_choice or self.gathered is not None


@dataclass(frozen=True)
class Network:
    """What the planner knows about a model."""

    weights: tuple[Weight, ...]  # all trained weights
    router_biases: int  # how many router biases there are; they are not trained
    # stacks in the order in which they run -> blocks, each with one attention, in one of its repeats (1 but in a group)
    groups: Mapping[str, int]
    # d_model, vocab_size: widths
    d_model: int
    vocab_size: int
    n_streams: int  # vectors of a token that go from block to block; 1 but with hyper-connections
    # n_experts, top_k, n_groups, top_groups: numbers of the routed experts; 1 each if there are none
    n_experts: int
    top_k: int
    n_groups: int
    top_groups: int
    readings: Mapping[str, tuple[Reading, ...]]  # by stack, of the blocks of one of its repeats
    mtp_reading: Reading  # of a depth of multi-token prediction
    # entries, expanded: numbers per token and layer of what an attention's cache keeps, and of keys and values: the
    # most of any layer
    entries: int
    expanded: int
    index_rests: bool = False  # as in an `Execution`

    @property
    def stacks(self) -> tuple[str, ...]:
        """The stacks of blocks, in the order in which they run."""
        return tuple(self.groups)

    @property
    def repeats(self) -> dict[str, int]:
        """How often each stack repeats its blocks: the smallest parts that a pipeline divides it into."""
        return {name: self.of(name)[0].repeats for name in self.groups}

    @property
    def n_layers(self) -> int:
        """The number of blocks of the main model."""
        return sum(n * self.groups[name] for name, n in self.repeats.items())

    @property
    def layers(self) -> dict[Reading, int]:
        """How many layers of the main model read in each way."""
        found: dict[Reading, int] = {}
        for name, n in self.repeats.items():
            for reading in self.readings[name]:
                found[reading] = found.get(reading, 0) + n
        return found

    @property
    def gathered(self) -> tuple[float, float]:
        """Numbers per token that divided sequences gather, the mean over layers: as wide as activations, in float32."""
        every = [(one.gathered or (self.entries, 0), n) for one, n in self.layers.items()]
        narrow, wide = (sum(numbers[i] * n for numbers, n in every) / self.n_layers for i in (0, 1))
        return narrow, wide

    @property
    def stream_width(self) -> int:
        """Numbers of a token that go from block to block."""
        return self.n_streams * self.d_model

    @property
    def stream_shape(self) -> tuple[int, ...]:
        """Their shape."""
        return (self.d_model,) if self.n_streams == 1 else (self.n_streams, self.d_model)

    @property
    def is_sparse(self) -> bool:
        """Whether there are layers in which a token does not attend to all before it."""
        return any(reading.most_keys is not None for reading in self.layers)

    def expert_blocks(self, stack: str) -> int:
        """Returns how many blocks in one repeat of a stack are mixtures of experts."""
        return len({w.name.rpartition(".")[0] for w in self.of(stack) if w.is_expert})

    @property
    def mtp_depth(self) -> int:
        """The number of depths of multi-token prediction, one block each."""
        return len({w.name.split(".")[1] for w in self.weights if w.part == MTP})

    def of(self, *parts: str) -> tuple[Weight, ...]:
        """Returns the weights of these top-level entries."""
        return tuple(w for w in self.weights if w.part in parts)

    def active(self, weight: Weight) -> int:
        """Returns the active parameters of a weight per token: top_k of n_experts for routed experts, otherwise all."""
        return weight.size * self.top_k // self.n_experts if weight.is_expert else weight.size

    def copies(self, weight: Weight) -> int:
        """Returns the rows per token in a weight's matmul: top_k for routed experts, otherwise 1."""
        return self.top_k if weight.is_expert else 1


@functools.cache
def describe(family: ModuleType, sizes: Sizes, index_rests: bool = False) -> Network:
    """Returns the network of a family's module and its `Config`; `index_rests` as in an `Execution`."""
    model = abstract_model(family, sizes, replace(BF16, index_rests=index_rests))
    _, params, router_bias = split(model)
    axes, _ = logical_axes(model)
    stacks = {name: getattr(model, name) for name in model.stacks}
    blocks: dict[str, tuple[Any, ...]] = {
        name: tuple(stack.blocks) if isinstance(stack, Group) else (stack,) for name, stack in stacks.items()
    }
    every = [block.attention for group in blocks.values() for block in group]
    rests = any(attention.rests for attention in every)

    def weight(path: tuple, logical: tuple, x: jax.ShapeDtypeStruct, role: str) -> Weight:
        return Weight(name := dotted(path), x.shape, logical, role, is_idle=rests and INDEXER in name)

    weights = jax.tree_util.tree_map_with_path(weight, axes, params, roles(model), is_leaf=is_axes)
    weights = tuple(jax.tree.leaves(weights, is_leaf=lambda x: isinstance(x, Weight)))
    experts = getattr(sizes, EXPERTS, None) if any(w.is_expert for w in weights) else None
    groups = {key: getattr(experts, key, 1) for key in ("n_experts", "top_k", "n_groups", "top_groups")}
    ahead = next((module.block.attention for module in getattr(model, MTP, ())), every[0])

    embedded_BTD = jax.ShapeDtypeStruct((1, 1, sizes.d_model), BF16.compute)

    def reading(attention: Any) -> Reading:
        per_pair = family.flops_per_pair(sizes)
        choice = attention.most_keys, attention.flops_per_index
        keys = attention.tokens_per_key, attention.window, attention.gathers_chosen, attention.gathered
        return Reading(per_pair, attention.flops_per_slot or per_pair, *choice, *keys)

    return Network(
        weights=weights,
        router_biases=size([x for x in jax.tree.leaves(router_bias) if jnp.issubdtype(x.dtype, jnp.floating)]),
        groups={name: len(group) for name, group in blocks.items()},
        d_model=sizes.d_model,
        vocab_size=sizes.vocab_size,
        n_streams=size(jax.eval_shape(model.begin, embedded_BTD)) // sizes.d_model,
        **groups,
        readings={name: tuple(reading(block.attention) for block in group) for name, group in blocks.items()},
        mtp_reading=reading(ahead),
        entries=max(attention.entry_width for attention in every),
        expanded=max(attention.expanded_width for attention in every),
        index_rests=index_rests,
    )


@functools.lru_cache(64)
def abstract_model(family: ModuleType, sizes: Sizes, run: Execution = BF16) -> Decoder:
    """Returns the model with shapes in place of arrays: one object for all that ask, which therefore only read it."""
    return abstract(lambda rngs: family.Model(sizes, run, rngs=rngs))


@functools.cache
def cache_bytes(family: ModuleType, sizes: Sizes, n_tokens: int, run: Execution = BF16) -> int:
    """Returns the bytes that prefill keeps of one sequence of `n_tokens`, in bfloat16 or as `run` says."""
    definition, params, router_bias = split(abstract_model(family, sizes, run))
    ids_BT = jax.ShapeDtypeStruct((1, 1), jnp.int32)

    def prefill(params: dict, router_bias: dict, ids_BT: jax.Array) -> object:
        model: Any = bind(definition, params, router_bias)
        return model.prefill(ids_BT, n_positions=n_tokens)[1]

    cache = jax.eval_shape(prefill, params, router_bias, ids_BT)
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))


def cache_bytes_per_token(family: ModuleType, sizes: Sizes, run: Execution = BF16) -> int:
    """Returns the bytes per token that prefill keeps in the key-value cache, in bfloat16 or as `run` says.

    That is for `LONG` tokens, rounded up; only where a key stands for several tokens does it depend on their number.
    """
    return -(-cache_bytes(family, sizes, LONG, run) // LONG)

"""How devices, sequences and layers are divided: the mesh, the micro-batches, the pipeline's stages.

The mesh is pipe x data x context x expert, with expert innermost. The sequences of a step are divided over data and
expert, the tokens of each over context; each share goes through the pipeline in micro-batches. Consecutive layers make
a stage; the embedding belongs to the first stage; final norm, head and multi-token prediction belong to the last (our
own runs divide embedding and head over all ranks: `parallel.vocabulary`). Layers need not divide evenly (V3: 61 over
16): each goes to the device with the least work, and no layer is split.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

from jax.sharding import AbstractMesh, Mesh

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.context import check_chunks
from deepseek_jax.parallel.mesh import ALL, sizes
from deepseek_jax.parallel.stages import divide, slices
from deepseek_jax.plan.flops import pair_flops
from deepseek_jax.plan.network import EMBEDDING, HEAD, MTP, Network, Weight


@dataclass(frozen=True)
class Layout:
    """Sizes of a step."""

    # pipe, data, expert: devices along each axis
    pipe: int
    data: int
    expert: int
    batch: int  # sequences per step, over all devices
    micro_batches: int  # parts into which each pipeline divides its sequences
    seq_len: int  # tokens per sequence
    context: int = 1  # devices over which each sequence is divided

    @property
    def devices(self) -> int:
        """The number of devices."""
        return self.pipe * self.data * self.context * self.expert

    @property
    def mesh(self) -> Mesh:
        """The mesh of one stage; its devices need not exist on this machine, since only its sizes are read."""
        return cast(Mesh, AbstractMesh((1, self.data, self.context, self.expert), ALL))

    @property
    def sequences(self) -> int:
        """The sequences per micro-batch and device, of each of which it may have a part."""
        return self.batch // (self.data * self.expert * self.micro_batches)

    @property
    def tokens(self) -> int:
        """The tokens per micro-batch and device."""
        return self.sequences * self.part_len

    @property
    def part_len(self) -> int:
        """The tokens of a sequence that a device has."""
        return self.seq_len // self.context

    @property
    def tokens_per_step(self) -> int:
        """The tokens per step, over all devices."""
        return self.batch * self.seq_len


def make_layout(
    *, pipe: int, data: int, expert: int, devices: int, batch: int, micro_batches: int, seq_len: int, context: int = 1
) -> Layout:
    """Returns the layout of a mesh and a batch. Raises UserError if a size is invalid or does not divide.

    Args:
        pipe, data, expert, context: mesh sizes; data=-1 takes the remaining devices.
        devices: number of devices; 0: as many as the mesh says, where data=-1 counts as 1.
        batch, seq_len: sequences per step, tokens per sequence.
        micro_batches: parts of each pipeline's sequences; in a pipeline, 1 means one sequence per micro-batch.
    """
    data = sizes(pipe, data, expert, devices, context)["data"]
    check_chunks(seq_len, context)
    replicas = data * expert
    if batch % replicas:
        raise UserError(
            f"config.batch.size={batch} does not divide over data {data} x expert {expert} = {replicas} devices. "
            f"Choose a multiple of {replicas}."
        )
    share = batch // replicas
    micro_batches = share if pipe > 1 and micro_batches == 1 else micro_batches
    if micro_batches < 1 or share % micro_batches:
        raise UserError(
            f"config.pipeline.micro_batches={micro_batches}: each of the {replicas} shares has {share} sequences. "
            f"Choose a divisor of {share}."
        )
    return Layout(pipe, data, expert, batch, micro_batches, seq_len, context)


@dataclass(frozen=True)
class Stage:
    """Consecutive layers."""

    # weights of its layers, and of embedding, head and multi-token prediction if it has them
    weights: tuple[Weight, ...]
    repeats: tuple[tuple[str, int], ...]  # (name, how often it is repeated here) of each stack
    n_layers: int  # of the main model
    n_expert_layers: int  # mixtures of experts, those of multi-token prediction included
    mtp_depth: int  # depths of multi-token prediction
    has_embedding: bool  # whether tokens enter the model in this stage
    has_head: bool  # whether the loss is computed in this stage

    @property
    def n_attentions(self) -> int:
        """The number of attention layers, those of multi-token prediction included."""
        return self.n_layers + self.mtp_depth


def make_stages(
    network: Network, n_stages: int, seq_len: int, *, folded: bool = False, slow: float = 1.0, has_head: bool = True
) -> tuple[Stage, ...]:
    """Returns the stages of a pipeline. Raises UserError if there are more stages than layers.

    Args:
        network, n_stages: what to divide, and into how many stages.
        seq_len: tokens per sequence (attention's share of the operations grows with it).
        folded: whether stage s and the s-th from the end are on one device. If not, multi-token prediction in the last
            stage needs an embedding of its own.
        slow: time of an operation of head or attention, relative to one of the blocks' matrices.
        has_head: whether the head's work is the last stage's, which gets fewer layers for it.
    """
    stacks, parts = network.repeats, sum(network.repeats.values())
    if n_stages > parts:
        what = "layer" if parts == network.n_layers else "group of layers"
        raise UserError(
            f"{n_stages} pipeline stages for {network.n_layers} layers: expected at most one stage per {what}. "
            "Choose a smaller config.mesh.pipe (with --schedule=dualpipev each device holds two stages)."
        )
    ends = network.of(*{w.part for w in network.weights} - {*network.stacks, EMBEDDING})
    has_experts = any(map(network.expert_blocks, stacks))
    stages = []
    counts = divide(parts, n_stages, end_in_layers(network, seq_len, slow, has_head=has_head), folded)
    for number, mine in enumerate(slices(stacks, counts)):
        first, last = number == 0, number == n_stages - 1
        repeats = tuple((name, part.stop - part.start) for name, part in mine.items())
        weights = [w.repeated(n) for name, n in repeats for w in network.of(name)]
        if first or (last and network.mtp_depth and not folded):
            weights += network.of(EMBEDDING)
        weights += ends if last else ()
        depth = network.mtp_depth if last else 0
        n_layers = sum(n * network.groups[name] for name, n in repeats)
        n_expert_layers = sum(n * network.expert_blocks(name) for name, n in repeats) + (depth if has_experts else 0)
        stages.append(Stage(tuple(weights), repeats, n_layers, n_expert_layers, depth, first, last))
    return tuple(stages)


def end_in_layers(network: Network, seq_len: int, slow: float, *, has_head: bool) -> float:
    """Returns the operations of multi-token prediction, and of the head if so, relative to a stack's repeat."""
    pairs = slow * pair_flops(network, seq_len, causal=True)

    def cost(*parts: str) -> float:
        return sum(2 * network.active(w) * (slow if w.role == "head" else 1) for w in network.of(*parts) if w.is_matrix)

    repeat = (cost(*network.stacks) + network.n_layers * pairs) / sum(network.repeats.values())
    head = (1 + network.mtp_depth) * cost(HEAD) if has_head else 0
    return (head + cost(MTP) + network.mtp_depth * pairs) / repeat


def describe_layers(stages: Sequence[Stage]) -> str:
    """Returns the layers per stage as text, equal neighbours together: "15 x 4, 1"."""
    runs = [(len(list(same)), n) for n, same in itertools.groupby(stage.n_layers for stage in stages)]
    return ", ".join(f"{k} x {n}" if k > 1 else f"{n}" for k, n in runs)

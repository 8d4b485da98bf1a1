"""Bytes that one device sends per step, and how long its links need for them at the maker's stated rate.

| what | bytes |
| --- | --- |
| exchange with experts | copies * D * (dispatch + combine) of each hop, per token and layer, there and back |
| ZeRO-1 | (R-1)/R * (gradients scattered + weights gathered) over the R replicas of each weight |
| FSDP | the same per layer and micro-batch: gathered before use, gradients scattered |
| context | (C-1) * entries per token, gathered forward and backward; float32 gradients scattered |
|  | where queries meet them as they are (V3.2, V4): forward, and again if recomputed; gradients as wide |
| pipeline | D per token, forward to the next stage and backward to the previous one |

A hop is between n devices (`parallel.alltoall`): (near-1)/n of its bytes go over the fast link, to those that it
reaches, (n-near)/n over the network. Copies: one for each device or group that a token goes to, which is at most one
per chosen expert, and at most as many as its groups of experts cover (V3 section 2.1.2, V2 section 2.2.2); we do not
correct for several chosen experts that share a device. Recipes of published runs go in two hops, with the nodes as
groups (V3 section 3.2.2): a token crosses the network once per node, then spreads over the fast link. A run does with
`config.exchange.groups`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_jax.chips import Chip
from deepseek_jax.parallel.alltoall import Hop
from deepseek_jax.parallel.context import CONTEXT
from deepseek_jax.parallel.mesh import DATA, size
from deepseek_jax.parallel.sharding import EXPERTS
from deepseek_jax.plan.job import Job, Part
from deepseek_jax.plan.recipes import MASTER

GIGA = 1e9


@dataclass(frozen=True)
class Sent:
    """Bytes that a device sends over each link."""

    fast: float = 0.0
    network: float = 0.0

    def __add__(self, other: "Sent") -> "Sent":
        return Sent(self.fast + other.fast, self.network + other.network)

    def times(self, factor: float) -> "Sent":
        """Returns `factor` times as much."""
        return Sent(self.fast * factor, self.network * factor)

    def seconds(self, chip: Chip) -> float:
        """Returns the time of the slower of the two links, which work at the same time."""
        return max(self.fast / chip.fast, self.network / chip.network) / GIGA

    @property
    def total(self) -> float:
        """The bytes of both links together."""
        return self.fast + self.network


@dataclass(frozen=True)
class Traffic:
    """What a device sends per step."""

    exchange: Sent  # with the experts' devices, forward and backward
    zero: Sent  # gradients and weights between replicas
    fsdp: Sent  # weights that are stored in shards
    context: Sent  # of divided sequences: what keys and values are made of, and its gradients
    pipeline: Sent  # activations and their gradients between stages

    @property
    def total(self) -> float:
        """The bytes of all kinds together."""
        return self.exchange.total + self.zero.total + self.fsdp.total + self.context.total + self.pipeline.total


def exchange(job: Job) -> Sent:
    """Returns the bytes per token to the experts of one layer and back, in the forward pass."""
    recipe = job.recipe
    row = job.network.d_model * recipe.exchanged + recipe.sent_beside * job.network.top_k
    return sum((_hop(job, hop, copies * row * recipe.padding) for copies, hop in job.hops), Sent())


def _hop(job: Job, hop: Hop, sent: float) -> Sent:
    """Returns `sent` bytes to all devices of a hop, by link: over the fast one to those that it reaches."""
    near = min(max(job.chip.reach // hop.stride, 1), hop.n)
    return Sent(sent * (near - 1) / hop.n, sent * (hop.n - near) / hop.n)


def rank_traffic(job: Job, rank: int) -> Traffic:
    """Returns what a device of this pipeline rank sends per step."""
    experts, zero, fsdp, pipeline = Sent(), Sent(), Sent(), Sent()
    forward = exchange(job)
    for hold in job.ranks[rank]:
        stage, tokens = job.stages[hold.stage], job.passes(hold) * job.layout.tokens
        exchanges = stage.n_expert_layers * (1 + job.backward_exchanges)
        experts += forward.times(tokens * exchanges)
        neighbours = (hold.stage > 0) + (hold.stage + 1 < len(job.stages))
        stream = tokens * job.network.stream_width * job.recipe.activations
        pipeline += _over(job, job.layout.devices, neighbours * stream)
        for part in job.parts[hold.stage]:
            zero += _zero(job, part, is_trained=not job.adapters).times(1 / job.schedule.arrangement.copies)
            fsdp += _fsdp(job, part).times(job.passes(hold))
    for part in job.adapter_parts:
        zero += _zero(job, part, is_trained=True)
    return Traffic(experts, zero, fsdp, context(job, rank), pipeline + _ends(job))


def context(job: Job, rank: int) -> Sent:
    """Returns the bytes per step of what attention gathers of divided sequences, and of its float32 gradients.

    It is gathered in both passes, and again where attention is recomputed. Where queries meet it as it is, it is kept
    for the backward pass unless a policy says otherwise, and gradients have its dtype.
    """
    layout, recipe = job.layout, job.recipe
    layers = sum(job.passes(hold) * job.stages[hold.stage].n_attentions for hold in job.ranks[rank])
    gathers = 2 + (recipe.remat == "block")
    row = job.network.entries * (gathers * recipe.activations + MASTER)
    if job.is_absorbed:
        row = (2 + (recipe.remat in ("block", "dots"))) * job.gathered_bytes
    return _over(job, _span(job, (CONTEXT,)), layers * layout.tokens * (layout.context - 1) * row)


def _ends(job: Job) -> Sent:
    """Returns the bytes of a vocabulary that ranks share: four sums over them, of what enters and leaves a lane.

    These are embeddings and hidden states, and the gradients of both; that of hidden states is float32.
    """
    if not job.shares_vocabulary:
        return Sent()
    numbers = job.layout.micro_batches * job.layout.tokens * (1 + job.network.mtp_depth) * job.network.d_model
    there_and_back = 2 * (job.layout.pipe - 1) / job.layout.pipe
    return _over(job, job.layout.devices, numbers * there_and_back * (3 * job.recipe.activations + MASTER))


def _over(job: Job, n_devices: int, sent: float) -> Sent:
    """Returns `sent` bytes between `n_devices` neighbours: over the fast link if it connects all of them."""
    return Sent(fast=sent) if n_devices <= job.chip.reach else Sent(network=sent)


def _span(job: Job, axes: Sequence[str]) -> int:
    """Returns the devices from the first to the last of a group along `axes`; expert is innermost, then context."""
    inner = job.layout.expert * (job.layout.context if DATA in axes or CONTEXT in axes else 1)
    return job.layout.data * inner if DATA in axes else inner


def _zero(job: Job, part: Part, *, is_trained: bool) -> Sent:
    """Returns the bytes of scattered gradients, if there are any, and gathered weights; copies are replicas too."""
    place, copies = part.place, job.schedule.arrangement.copies
    replicas = size(job.layout.mesh, place.copies) * copies
    span = _span(job, place.copies) * (job.layout.pipe if copies > 1 else 1)
    all_reduced = place.zero_dim is None and copies == 1  # no dimension divides: summed everywhere, nothing to gather
    gradients, read = job.recipe.gradients * is_trained, job.read(part)
    rounds = 2 * gradients if all_reduced else gradients + read
    return _over(job, span, part.numbers * (replicas - 1) / replicas * rounds)


def _fsdp(job: Job, part: Part) -> Sent:
    """Returns the bytes of a sharded weight: gathered forward, again for recomputation, gradients scattered."""
    gathers, sent = 1 + (job.recipe.remat != "none"), Sent()
    for logical, axis in zip(part.weight.axes, part.place.spec, strict=False):
        if axis and logical != EXPERTS:
            others = part.numbers * (job.layout.mesh.shape[axis] - 1)
            gradients = 0.0 if job.adapters else job.recipe.gradients
            rounds = gathers * job.recipe.read(part.weight.role) + gradients
            sent += _over(job, _span(job, (axis,)), others * rounds)
    return sent

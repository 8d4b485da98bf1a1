"""How long a step takes: a roofline, and the same with the recipe's calibrated efficiency.

    matmul       max(operations / rate, bytes / memory bandwidth);  rate = efficiency * peak in FP8 or bfloat16
    W            as long as the forward pass's matmuls
    B            W + input gradients + recomputation; attention's pairs take twice as long as forward
    F&B          max(F + B, their exchanges) if the schedule overlaps them, else F + B + exchanges
    step         micro-batches * F&B of the slowest device's stages + bubble + ZeRO-1 and FSDP + optimizer

The roofline has efficiency 1: it is a bound for this plan. The calibrated efficiency is `Recipe.efficiency`, fitted to
one measurement per recipe (`recipes` says which).
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

from deepseek_jax.layers.attention import RECOMPUTED_FROM
from deepseek_jax.parallel.schedule import make_schedule
from deepseek_jax.parallel.simulate import Times, bubble, simulate
from deepseek_jax.plan.flops import pair_flops
from deepseek_jax.plan.job import Job, Part
from deepseek_jax.plan.network import HIGH_PRECISION, Reading, Weight
from deepseek_jax.plan.recipes import V3_POLICY
from deepseek_jax.plan.schedules import name_of
from deepseek_jax.plan.traffic import GIGA, exchange, rank_traffic

TERA = 1e12
NEWTON_SCHULZ = 10  # steps with which Muon brings a matrix to its polar factor
PAIRS_BACKWARD = 2  # time of the gradients of scores and values, in forward passes


@dataclass(frozen=True)
class Compute:
    """Seconds of arithmetic per stage and micro-batch."""

    matmuls: float  # forward pass of the matrices; input gradients and weight gradients each take as long
    pairs: float  # forward pass of attention's scores and weighted sums
    recomputed: float  # what the backward pass recomputes

    @property
    def forward(self) -> float:
        """F."""
        return self.matmuls + self.pairs

    @property
    def backward(self) -> float:
        """B, weight gradients included."""
        return 2 * self.matmuls + PAIRS_BACKWARD * self.pairs + self.recomputed


@dataclass(frozen=True)
class Step:
    """Seconds per step on the slowest device."""

    compute: float  # arithmetic of all micro-batches
    exchange: float  # all-to-all with the experts that arithmetic does not hide
    bubble: float  # waiting for other stages
    reduce: float  # gradients and weights between replicas, and FSDP
    context: float  # gathering what keys and values of divided sequences are made of
    optimizer: float  # reading and writing the optimizer state; Muon's products

    @property
    def total(self) -> float:
        """The whole step."""
        return self.compute + self.exchange + self.bubble + self.reduce + self.context + self.optimizer


def stage_compute(job: Job, number: int, efficiency: float) -> Compute:
    """Returns the arithmetic of one micro-batch in a stage."""
    stage, tokens = job.stages[number], job.layout.tokens
    pairs = stage.n_attentions * _pairs(job) * tokens / (job.chip.bf16 * TERA * efficiency)
    matmuls, recomputed = 0.0, pairs * recomputes_pairs(job)
    for part, passes in _products(job, number):
        seconds = _matmul(job, part, efficiency) * passes
        matmuls += seconds
        is_again = part.weight.expands and job.layout.context > 1 and not job.is_absorbed
        recomputed += seconds * (recomputes(job, part.weight) + is_again)
    return Compute(matmuls, pairs, recomputed)


def _products(job: Job, number: int) -> Iterator[tuple[Part, float]]:
    """Yields the matrices of a stage, and how often a micro-batch is multiplied by each.

    By the head once for each depth of multi-token prediction more; where ranks share it, each has its part of that.
    Keys and values of divided sequences are made for each chunk that is looked at; in the absorbed form never.
    """
    depths, context = 1 + job.network.mtp_depth, job.layout.context
    is_in_chunks = context > 1 and not job.is_absorbed
    expansions = context + 0.5 if is_in_chunks else 1  # 2 C + 1 chunks where a device has two (`divided_attention`)
    for part in job.parts[number]:
        is_head = part.weight.role == "head"
        if part.weight.is_matrix and not (is_head and job.shares_vocabulary):
            yield part, depths if is_head else expansions if part.weight.expands else 1
    if job.shares_vocabulary and number < job.layout.pipe:  # the first stage of each rank
        yield from ((part, depths / job.layout.pipe) for part in job.parts[-1] if part.weight.role == "head")


def recomputed_flops(job: Job) -> float:
    """Returns the operations per token that the backward pass recomputes, over all stages."""
    again = sum(2 * job.network.active(w) for w in job.network.weights if w.is_matrix and recomputes(job, w))
    return again + recomputes_pairs(job) * (job.network.n_layers + job.network.mtp_depth) * _pairs(job)


def recomputes(job: Job, weight: Weight) -> bool:
    """Returns whether the backward pass recomputes a matrix's forward pass.

    "block": all layers. "dots": the routed experts, whose loop is not kept; the same holds under every policy if they
    are exchanged (`parallel.alltoall`). V3: everything that is computed from latents.
    """
    if weight.role == "head":
        return False
    if job.recipe.remat == V3_POLICY:
        return weight.reads_latent
    return job.recipe.remat == "block" or (weight.is_expert and (job.recipe.remat == "dots" or job.expert_devices > 1))


def recomputes_pairs(job: Job) -> bool:
    """Returns whether attention's scores are recomputed: by the policy, or because sequences are long."""
    remat = job.recipe.remat
    return remat in ("block", "dots") or (remat == "none" and job.layout.seq_len > RECOMPUTED_FROM)


def mean_times(job: Job, efficiency: float) -> Times:
    """Returns F, B, W and F&B of the bubble formulas, averaged over the stages."""
    seconds = []
    for number in range(len(job.stages)):
        c = stage_compute(job, number, efficiency)
        seconds.append((c.forward, c.backward, c.matmuls, _exchange_seconds(job, number)))
    forward, backward, weights, sent = (sum(column) / len(seconds) for column in zip(*seconds, strict=True))
    again, both = job.backward_exchanges, forward + backward
    both = max(both, (1 + again) * sent) if job.schedule.overlaps else both + (1 + again) * sent
    return Times(forward + sent, backward + again * sent, weights, both)


def step(job: Job, efficiency: float = 1.0) -> Step:
    """Returns the step of the slowest device."""
    return slowest(job, efficiency)[1]


def bubble_seconds(job: Job, efficiency: float) -> float:
    """Returns how long a device waits: by the schedule's formula, simulated where `put_off` changes the schedule.

    More micro-batches than two per device would change nothing.
    """
    times, at = mean_times(job, efficiency), job.layout
    if job.put_off < 0:
        return job.schedule.bubble(len(job.stages), times)
    return _simulated(name_of(job.schedule), at.pipe, min(at.micro_batches, 2 * at.pipe), job.put_off, times)


@cache
def _simulated(name: str, n_ranks: int, micro_batches: int, put_off: int, times: Times) -> float:
    return bubble(simulate(make_schedule(name, n_ranks, micro_batches, put_off), times.seconds))


def bubble_rule(job: Job) -> str:
    """Returns where `bubble_seconds` comes from, for people."""
    return job.schedule.formula if job.put_off < 0 else f"simulated: at most {job.put_off} W put off"


def slowest(job: Job, efficiency: float) -> tuple[int, Step]:
    """Returns the pipeline rank of the slowest device, and its step."""
    waiting = bubble_seconds(job, efficiency)
    steps = [_rank_step(job, rank, efficiency, waiting) for rank in range(len(job.ranks))]
    return max(enumerate(steps), key=lambda pair: pair[1].total)


def _rank_step(job: Job, rank: int, efficiency: float, waiting: float) -> Step:
    compute = exposed = optimizer = 0.0
    for hold in job.ranks[rank]:
        arithmetic = stage_compute(job, hold.stage, efficiency)
        seconds = arithmetic.forward + arithmetic.backward
        sent = _exchange_seconds(job, hold.stage) * (1 + job.backward_exchanges)
        compute += job.passes(hold) * seconds
        exposed += job.passes(hold) * (max(sent - seconds, 0.0) if job.schedule.overlaps else sent)
        trained = job.adapter_parts or job.parts[hold.stage]
        optimizer += sum(_update_seconds(job, part, efficiency) for part in trained) / job.schedule.arrangement.copies
    traffic = rank_traffic(job, rank)
    reduce = traffic.zero.seconds(job.chip) + traffic.fsdp.seconds(job.chip)
    return Step(compute, exposed, waiting, reduce, traffic.context.seconds(job.chip), optimizer)


def _update_seconds(job: Job, part: Part, efficiency: float) -> float:
    """Returns the seconds of updating a weight: its state through the memory, and Muon's products.

    Ten steps of X <- a X + b (X X^T) X + c (X X^T)^2 X on the shorter side, each by one of the devices that keep parts;
    in TF32, at half the rate of bfloat16.
    """
    recipe, weight = job.recipe, part.weight
    through = recipe.gradients + 2 * recipe.optimizer(weight.role) + recipe.weights
    seconds = part.optimizer_numbers * through / (job.chip.hbm * GIGA)
    if not recipe.by_muon(weight.role):
        return seconds
    short, long = sorted(weight.widths)
    per_number = NEWTON_SCHULZ * (4 * short + 2 * short**2 / long)
    return seconds + part.optimizer_numbers * per_number / (efficiency * job.chip.bf16 / 2 * TERA)


def _pairs(job: Job) -> float:
    """Returns the forward operations of attention per token and layer: in the absorbed form those of a cache."""
    network = job.network
    if job.is_absorbed:
        readings = {name: tuple(map(_over_latents, group)) for name, group in network.readings.items()}
        network = replace(network, readings=readings)
    return pair_flops(network, job.layout.seq_len, causal=True)


def _over_latents(reading: Reading) -> Reading:
    return replace(reading, flops_per_pair=reading.flops_per_slot)


def _exchange_seconds(job: Job, number: int) -> float:
    """Returns the seconds of one micro-batch to the experts of a stage and back, in the forward pass."""
    tokens = job.layout.tokens * job.stages[number].n_expert_layers
    return exchange(job).times(tokens).seconds(job.chip)


def _matmul(job: Job, part: Part, efficiency: float) -> float:
    """Returns the seconds of a weight's forward matmuls, over all its layers in the stage, per micro-batch.

    Products with one matrix per head, as absorbed attention has them, stay in bfloat16.
    """
    weight, tokens = part.weight, job.layout.tokens
    is_per_head = weight.expands and job.is_absorbed
    low = job.recipe.fp8 and weight.role not in HIGH_PRECISION and not is_per_head
    widths = weight.absorbed_widths if is_per_head else weight.widths
    rate = (job.chip.fp8 if low else job.chip.bf16) * TERA * efficiency
    rows = tokens * job.network.copies(weight) * weight.repeats
    moved = (part.numbers + rows * sum(widths)) * (1.0 if low else job.recipe.activations)
    return max(2 * job.network.active(weight) * tokens / rate, moved / (job.chip.hbm * GIGA))

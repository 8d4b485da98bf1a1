"""Bytes per device of each pipeline rank, by part. All devices of a rank hold the same.

| part | bytes |
| --- | --- |
| weights, gradients | as a step reads them, per the recipe, divided as in a run (`parallel.sharding.placements`) |
| pipeline copy | the same for the second stage, if a schedule keeps two copies of the model |
| masters | the float32 weights, unless a step reads just these; divided like the optimizer state |
| optimizer | both moments, of a matrix with Muon one, divided further over all replicas (ZeRO-1), in both copies |
| activations | `activations.kept` of each layer, times sequences, times micro-batches in flight |
| buffers | in place of these in a run's pipeline: slots of its pools (`stage_buffers`), the same on all ranks |
| kept once | independent of the batch, by policy none and by a run's pipeline: experts' gate and up side by side |
| adapters | where these are trained, gradients and moments are theirs alone; their weights, and matrices with them |
|  | added, as a step reads these, of all layers unless blocks are recomputed |
| layer at work | recomputed in the backward pass of the widest layer, and its gradients; what lay in pieces, whole |
| logits | 8 V per token of the chunk in which the loss is computed: float32, and their gradient |
| exchange buffers | copies of the tokens on their way to experts and back; twice if passes overlap |
| gathered entries | of divided sequences: what a layer's keys and values are made of; one chunk of these; gradients |
|  | where queries meet these as they are (V3.2, V4), among activations and the layer at work |

In a run's pipeline weights and gradients are arrays that its stages share, as many on all ranks (`parallel.homes`).

Not counted: memory of the compiler and the communication library, and fragmentation.

Compared with runs: V3's widths, 3 layers, 32 experts, recipe run on one H200, peak GiB as JAX reports it.

| policy, sequences | computed | measured |
| --- | --- | --- |
| none, 1 | 74.4 | 73.5 |
| block, 2 | 73.6 | 69.3 |
| dots, 4 | 96.7 | 98.8 |
"""

from collections.abc import Mapping

from deepseek_jax.plan.activations import FLOAT32, ActivationBytes
from deepseek_jax.plan.job import Holding, Job, Part
from deepseek_jax.plan.layout import Stage
from deepseek_jax.plan.network import HIGH_PRECISION
from deepseek_jax.plan.recipes import MASTER, V3_POLICY
from deepseek_jax.plan.schedules import name_of
from deepseek_jax.plan.stage_buffers import POOLS, slot_bytes, slots

PARTS: tuple[str, ...] = ("weights", "gradients", "pipeline_copy", "masters", "optimizer", "activations")
PARTS += (
    "adapters",
    "buffers",
    "kept_once",
    "layer_at_work",
    "logits",
    "exchange_buffers",
    "gathered_entries",
    "router_biases",
)
LOGITS = 8.0  # bytes: float32 and the same for its gradient
BIAS = 4.0
BARELY = 0.05  # of a chip's memory: what is not counted may take as much


def rank_memory(job: Job, rank: int, kept: Mapping[str, ActivationBytes], loss_chunk: int) -> dict[str, float]:
    """Returns bytes by part on a device of this pipeline rank.

    `kept`: what a layer of each stack keeps for the backward pass. `loss_chunk`: tokens whose logits exist at a time.
    """
    network, layout, recipe = job.network, job.layout, job.recipe
    held = job.ranks[rank]
    sharing = layout.pipe if job.shares_vocabulary else 1  # ranks that share the vocabulary
    found = dict.fromkeys(PARTS, 0.0) | _states(job, rank)
    has_buffers = any(layer.pools for layer in kept.values())
    found["buffers"] = _buffers(job, kept) if has_buffers else 0.0
    for hold in held:
        stage = job.stages[hold.stage]
        in_flight = 0 if has_buffers else min(hold.in_flight, layout.micro_batches)
        found["activations"] += in_flight * layout.sequences * stage_activations(job, stage, kept)
        found["kept_once"] += sum(n * kept[name].per_layer for name, n in layers_of(job, stage))
        if stage.has_head or sharing > 1:
            found["logits"] = LOGITS * min(loss_chunk, layout.tokens) * network.vocab_size / sharing
    found["router_biases"] = BIAS * job.router_biases
    found["layer_at_work"] = max(_at_work(job, hold.stage, kept) for hold in held)
    if job.expert_devices > 1:
        hops = job.hops[-1:] if recipe.node_limited else job.hops  # published runs buffer nothing in between
        rows = layout.tokens * sum(copies for copies, _ in hops) * recipe.padding
        found["exchange_buffers"] = rows * network.d_model * recipe.exchanged * (2 if job.schedule.overlaps else 1)
    if layout.context > 1:
        found["gathered_entries"] = _gathered_entries(job)
    return {name: n_bytes for name, n_bytes in found.items() if n_bytes}


def _gathered_entries(job: Job) -> float:
    """Returns the bytes that attention makes of divided sequences in its backward pass, if no trace counts them."""
    network, layout, recipe = job.network, job.layout, job.recipe
    if job.is_absorbed:
        is_traced = recipe.remat != V3_POLICY
        return 0.0 if is_traced else layout.tokens * layout.context * 2 * job.gathered_bytes
    whole = layout.seq_len * network.entries * (recipe.activations + FLOAT32)
    chunk = layout.part_len // 2 * network.expanded * 2 * recipe.activations
    return layout.sequences * (whole + chunk)


def _buffers(job: Job, kept: Mapping[str, ActivationBytes]) -> float:
    """Returns the bytes of the pools of a run's pipeline."""
    n_slots = slots(name_of(job.schedule), job.layout.pipe, job.layout.micro_batches, job.put_off)
    stream = job.layout.tokens * job.network.stream_width * job.recipe.activations
    of_stages = sum(n_slots[pool] * _slot(job, kept, pool) for pool in POOLS)
    of_ends = n_slots["d_out"] * (1 + job.network.mtp_depth)  # of what the head reads
    return (n_slots["x"] + n_slots["dy"] + of_ends) * stream + of_stages


def _slot(job: Job, kept: Mapping[str, ActivationBytes], pool: str) -> float:
    grown = {name: layer.pools or {} for name, layer in kept.items()}
    return slot_bytes(pool, [layers_of(job, stage) for stage in job.stages], grown)


def between_switches(job: Job, kept: Mapping[str, ActivationBytes]) -> float:
    """Returns the bytes that B hands to W within an op where they are two switches, as on CPUs; 0 without a pipeline.

    In one branch the W of a layer may follow its B at once.
    """
    return _slot(job, kept, "stash") if any(layer.pools for layer in kept.values()) else 0.0


def by_rank(job: Job, kept: Mapping[str, ActivationBytes], loss_chunk: int) -> list[dict[str, float]]:
    """Returns `rank_memory` of each pipeline rank."""
    return [rank_memory(job, rank, kept, loss_chunk) for rank in range(len(job.ranks))]


def fullest(job: Job, kept: Mapping[str, ActivationBytes], loss_chunk: int) -> float:
    """Returns the bytes on the fullest device."""
    return max(sum(parts.values()) for parts in by_rank(job, kept, loss_chunk))


def between_steps(job: Job, rank: int) -> float:
    """Returns the bytes that a device keeps between steps: its parts of the float32 weights, moments, router biases."""
    held = [(part, part.optimizer_numbers * kept) for part, _, kept in job.holdings(rank)]
    adapters = [(part, part.optimizer_numbers) for part in job.adapter_parts]
    moments = sum(n * job.recipe.moments_of(part.weight.role) for part, n in adapters or held)
    return sum(n for _, n in held + adapters) * MASTER + moments + BIAS * job.router_biases


def carried(job: Job, parts: Mapping[str, float], rank: int) -> float:
    """Returns the bytes of `parts` that the loop over micro-batches carries: buffers, and sums of gradients."""
    trained = job.adapter_parts or [holding.part for holding in _in_step(job, rank)]
    summed = sum(part.numbers for part in trained) if has_sums(job) else 0.0
    return parts.get("buffers", 0.0) + summed * job.recipe.gradients


def capacity(job: Job) -> float:
    """Returns the bytes of a device's memory."""
    return job.chip.memory * 2**30


def has_sums(job: Job) -> bool:
    """Returns whether sums over micro-batches exist beside the gradients of the current one.

    They do in `train.gradients.accumulated`, and in `parallel.pipeline`; other pipelines add in place.
    """
    return job.layout.micro_batches > 1 and (job.layout.pipe == 1 or job.recipe.alike)


def _gradients(job: Job, part: Part) -> float:
    """Returns the bytes of a weight's gradients."""
    recipe = job.recipe
    is_alike = recipe.alike and not part.place.is_sharded
    made = recipe.read(part.weight.role) if is_alike else recipe.gradients
    return part.numbers * (made + recipe.gradients * has_sums(job))


def _in_step(job: Job, rank: int) -> list[Holding]:
    """Returns what a step reads and has gradients of: in a run's pipeline the same on all ranks (`parallel.homes`)."""
    return [*job.homes, *job.ends] if job.shares_vocabulary else job.holdings(rank)


def _states(job: Job, rank: int) -> dict[str, float]:
    """Returns the bytes of weights, gradients and optimizer state."""
    recipe, moments_of = job.recipe, job.recipe.moments_of
    found = dict.fromkeys(("weights", "gradients", "pipeline_copy", "masters", "optimizer", "adapters"), 0.0)
    for part, _, kept in job.holdings(rank):
        weights, master = job.held(part)
        found["weights"] += 0.0 if master else weights
        found["masters"] += master * kept
        found["optimizer"] += 0.0 if job.adapters else part.optimizer_numbers * moments_of(part.weight.role) * kept
    for part, is_copy, _ in _in_step(job, rank):
        low = part.weight.is_matrix and part.weight.role not in HIGH_PRECISION
        weights, master = job.held(part)
        beside = (weights if master else 0.0) + part.numbers * low * recipe.low_precision_copy
        found["pipeline_copy" if is_copy else "weights"] += beside
        found["pipeline_copy" if is_copy else "gradients"] += 0.0 if job.adapters else _gradients(job, part)
    for part in job.adapter_parts:
        found["adapters"] += sum(job.held(part))
        found["gradients"] += _gradients(job, part)
        found["optimizer"] += part.optimizer_numbers * moments_of(part.weight.role)
    if job.adapters and recipe.remat != "block":
        found["adapters"] += job.adapted * recipe.weights
    return found


def _at_work(job: Job, number: int, kept: Mapping[str, ActivationBytes]) -> float:
    """Returns the bytes that the backward pass of a stage's widest layer needs beyond what was kept.

    Our own loop over stacked layers holds a layer's gradients beside those of the stack; V3 adds them in place.
    """
    beside = 0.0 if job.recipe.remat == V3_POLICY else job.recipe.gradients

    def bytes_of(name: str) -> float:
        layer = sum(p.numbers / p.weight.repeats for p in job.parts[number] if p.weight.part == name)
        made = job.layout.sequences * kept[name].work_per_sequence + kept[name].work_per_layer
        return made + beside * layer

    widest = max((bytes_of(name) for name, _ in layers_of(job, job.stages[number])), default=0.0)
    return widest + job.put_together(number)


def layers_of(job: Job, stage: Stage) -> list[tuple[str, float]]:
    """Returns (stack, how often it is repeated) in a stage; an MTP depth counts as a layer of the last stack."""
    last = job.network.stacks[-1]
    return [*stage.repeats, *([(last, stage.mtp_depth / job.network.groups[last])] if stage.mtp_depth else [])]


def stage_activations(job: Job, stage: Stage, kept: Mapping[str, ActivationBytes]) -> float:
    """Returns the bytes that a stage keeps per sequence: of its layers, and the inputs of head and MTP."""
    layers = sum(n * kept[name].per_sequence for name, n in layers_of(job, stage))
    streams = stage.has_head + 2 * stage.mtp_depth
    return layers + streams * job.layout.part_len * job.network.d_model * job.recipe.activations

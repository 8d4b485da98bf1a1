"""Bytes on each device along the pipeline, by part; the devices of one rank are alike.

| part | bytes |
| --- | --- |
| weights, gradients | as the recipe says, cut as a run cuts them (`parallel.sharding.placements`) |
| pipeline copy | the same of the second stage, where a schedule keeps two copies of the model |
| optimiser | as the recipe says, cut further over all replicas (ZeRO-1), the second copy being one |
| activations | `activations.kept` of each layer, times sequences, times micro-batches in flight |
| kept once | what it keeps whatever the batch: under policy none its weights in the compute dtype |
| layer at work | what the backward pass of the widest layer makes again, and its gradients (`activations.Kept`) |
| logits | 8 V a token of the chunk in which the loss is computed: float32, and their gradient |
| exchange buffers | copies of the tokens on their way to experts and back; twice where passes overlap |

Not counted: what the compiler and the communication library take for themselves, and fragmentation.

Against runs: V3's widths, 3 layers, 32 experts, recipe run on one H200, peak GiB as JAX tells it.

| policy, sequences | here | measured |
| --- | --- | --- |
| none, 1 | 78.1 | 73.5 |
| block, 2 | 74.9 | 69.3 |
| dots, 4 | 98.0 | 98.8 |
"""

from collections.abc import Mapping

from deepseek_jax.plan.activations import Kept
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.layout import Stage
from deepseek_jax.plan.network import HEAD
from deepseek_jax.plan.recipes import V3_POLICY

PARTS = ("weights", "gradients", "pipeline_copy", "optimiser", "activations", "kept_once")
PARTS += ("layer_at_work", "logits", "exchange_buffers", "router_biases")
LOGITS = 8.0  # bytes: float32 and the same for its gradient
BIAS = 4.0
BARELY = 0.05  # of a chip's memory: what is not counted easily takes as much


def rank_memory(job: Job, rank: int, kept: Mapping[str, Kept], loss_chunk: int) -> dict[str, float]:
    """Bytes by part on a device of this rank of the pipeline.

    Args:
        job: what is planned.
        rank: place along the pipeline.
        kept: what a layer of each stack keeps.
        loss_chunk: tokens whose logits exist at a time.
    """
    network, layout, recipe = job.network, job.layout, job.recipe
    held = job.ranks[rank]
    found = dict.fromkeys(PARTS, 0.0) | _states(job, rank)
    for hold in held:
        stage = job.stages[hold.stage]
        in_flight = min(hold.in_flight, layout.micro_batches)
        found["activations"] += in_flight * layout.sequences * stage_activations(job, stage, kept)
        found["kept_once"] += sum(n * kept[name].per_layer for name, n in layers_of(job, stage))
        if stage.has_head:
            found["logits"] = LOGITS * min(loss_chunk, layout.tokens) * network.vocab_size
    found["router_biases"] = BIAS * network.router_biases
    found["layer_at_work"] = max(_at_work(job, hold.stage, kept) for hold in held)
    if job.expert_devices > 1:
        rows = layout.tokens * min(network.top_k, job.expert_devices) * recipe.padding
        found["exchange_buffers"] = rows * network.d_model * recipe.exchanged * (2 if job.schedule.overlaps else 1)
    return {name: n_bytes for name, n_bytes in found.items() if n_bytes}


def fullest(job: Job, kept: Mapping[str, Kept], loss_chunk: int) -> float:
    """Bytes on the fullest device."""
    return max(sum(rank_memory(job, rank, kept, loss_chunk).values()) for rank in range(len(job.ranks)))


def capacity(job: Job) -> float:
    """Bytes of a device's memory."""
    return job.chip.memory * 2**30


def gradient_copies(job: Job) -> int:
    """2 where sums over micro-batches stand beside the gradients of the present one, as in `train.step`.

    A pipeline adds in place.
    """
    return 2 if job.layout.pipe == 1 and job.layout.micro_batches > 1 else 1


def _states(job: Job, rank: int) -> dict[str, float]:
    """Bytes of weights, gradients and the optimiser's state."""
    recipe, found = job.recipe, dict.fromkeys(("weights", "gradients", "pipeline_copy", "optimiser"), 0.0)
    for number, hold in enumerate(job.ranks[rank]):
        is_copy = job.schedule.copies > 1 and number > 0
        for part in job.parts[hold.stage]:
            low = part.weight.is_matrix and part.weight.part != HEAD and not part.weight.is_router
            weights = part.numbers * (recipe.weights + low * recipe.low_precision_copy)
            gradients = part.numbers * recipe.gradients * gradient_copies(job)
            found["pipeline_copy" if is_copy else "weights"] += weights
            found["pipeline_copy" if is_copy else "gradients"] += gradients
            found["optimiser"] += part.optimizer_numbers * recipe.optimizer / job.schedule.copies
    return found


def _at_work(job: Job, number: int, kept: Mapping[str, Kept]) -> float:
    """Bytes that the backward pass of a stage's widest layer needs besides what was kept.

    Our own loop over stacked layers has a layer's gradients beside those of the stack; V3 adds them where they belong.
    """
    beside = 0.0 if job.recipe.remat == V3_POLICY else job.recipe.gradients

    def bytes_of(name: str) -> float:
        layer = sum(p.numbers / p.weight.n_layers for p in job.parts[number] if p.weight.part == name)
        made = job.layout.sequences * kept[name].work_per_sequence + kept[name].work_per_layer
        return made + beside * layer

    return max((bytes_of(name) for name, _ in layers_of(job, job.stages[number])), default=0.0)


def layers_of(job: Job, stage: Stage) -> list[tuple[str, int]]:
    """Layers of each stack in a stage, a depth of multi-token prediction counting as one of the last stack."""
    return [*stage.layers, *([(job.network.stacks[-1], stage.n_ahead)] if stage.n_ahead else [])]


def stage_activations(job: Job, stage: Stage, kept: Mapping[str, Kept]) -> float:
    """Bytes that a stage keeps of one sequence: its layers', and what the head and multi-token prediction read."""
    layers = sum(n * kept[name].per_sequence for name, n in layers_of(job, stage))
    streams = stage.has_head + 2 * stage.n_ahead
    return layers + streams * job.layout.seq_len * job.network.d_model * job.recipe.activations

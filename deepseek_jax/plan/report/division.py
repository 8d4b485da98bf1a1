"""How a step is divided over the devices: layout, memory of a device, and the bytes that it sends."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from deepseek_jax import units
from deepseek_jax.chips import CHIPS
from deepseek_jax.plan import figures, rollout
from deepseek_jax.plan.figures import DERIVED, GIGA, GIVEN, PUBLISHED, Column, Figure, Row, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.layout import describe_layers
from deepseek_jax.plan.memory import BARELY, between_steps, capacity, has_sums
from deepseek_jax.plan.report.inputs import contents
from deepseek_jax.plan.rollout import Drawing
from deepseek_jax.plan.traffic import Sent, rank_traffic
from deepseek_jax.plan.verdict import mesh_text

GROWS_WITH_MICRO_BATCH = ("activations", "layer_at_work", "exchange_buffers", "gathered_entries")
HOST_DEVICES, HOST_GBPS = 8, 1.0  # of the host whose time for a save is stated: to a bucket, or a disk
TRAFFIC_LABELS = {"exchange": "all-to-all", "zero": "ZeRO-1: scatter, gather", "fsdp": "FSDP"}
TRAFFIC_LABELS |= {"context": "gathered over context", "pipeline": "p2p"}


def layout(job: Job) -> Section:
    """Returns how devices, sequences and layers are divided."""
    at, plain = job.layout, figures.plain
    sequences = f"{at.batch:,} sequences of {at.seq_len:,}"
    micro_batch = f"of {at.sequences} x {at.part_len:,} tokens per device"
    rows = [
        ("devices", plain("devices_count", at.devices, mark=GIVEN), mesh_text(job)),
        ("tokens per step", plain("tokens_per_step_count", at.tokens_per_step), sequences),
        ("micro-batches per pipeline", plain("micro_batches_count", at.micro_batches), micro_batch),
    ]
    if len(job.stages) > 1:
        layers = Figure("layers_per_stage", [s.n_layers for s in job.stages], describe_layers(job.stages), DERIVED)
        rows.append(("layers per stage", layers, "each layer goes to the device with the least work"))
        for rank in sorted({0, at.pipe - 1}):
            text = contents(job, rank)
            rows.append((f"  rank {rank}", Figure(f"rank_{rank}", text, "", DERIVED), text))
    return figures.column("layout", "layout", rows)


def memory(job: Job, ranks: Sequence[Mapping[str, float]]) -> Section:
    """Returns what the fullest device holds, and whether it fits."""
    totals = [sum(parts.values()) for parts in ranks]
    fullest, emptiest = totals.index(max(totals)), totals.index(min(totals))
    parts, total, notes = ranks[fullest], totals[fullest], _memory_notes(job)
    rows = [(name.replace("_", " "), figures.gib(name, n), notes.get(name, "")) for name, n in parts.items()]
    where = "every device" if len(set(totals)) == 1 else f"rank {fullest}: {contents(job, fullest)}"
    rows.append(("total, fullest device", figures.gib("total", total), where))
    if len(ranks) > 1:
        rows.append(("emptiest device", figures.gib("emptiest_total", totals[emptiest]), f"rank {emptiest}"))
    known = PUBLISHED if job.chip in CHIPS.values() else GIVEN
    rows.append((f"memory of {job.chip.name}", figures.gib("chip_memory", capacity(job), known), ""))
    rows += [*_whether_it_fits(job, parts, total), _checkpoint(job)]
    return figures.column("memory", "memory per device", rows)


def drawn(job: Job, drawing: Drawing) -> Section:
    """Returns what a device holds while answers are drawn; the memory above is that of an update."""
    parts = rollout.memory(job, drawing)
    notes = {
        "train_state": "float32 weights and moments rest meanwhile",
        "reference": "beside the update, too",
        "weights": "as a step reads them, gathered from shards once per rollout",
        "cache": f"{drawing.rows:,} answers at a time over all devices, {drawing.tokens:,} tokens with their prompts",
        "logits": "of one token per answer",
    }
    rows = [(name.replace("_", " "), figures.gib(f"drawing_{name}", n), notes[name]) for name, n in parts.items()]
    total = sum(parts.values())
    fits = "fits" if total <= capacity(job) else f"of {job.chip.name}'s {job.chip.memory} GiB: draw fewer at a time"
    rows.append(("total", figures.gib("drawing_total", total), f"{fits} (config.rl.rows_at_once)"))
    return figures.column("drawing", "memory per device while answers are drawn", rows)


def _checkpoint(job: Job) -> tuple[str, Figure, str]:
    """Returns what the fullest device's process writes of a checkpoint, and how long its host takes."""
    n_bytes = max(between_steps(job, rank) for rank in range(len(job.ranks)))
    n_devices = min(HOST_DEVICES, job.layout.devices)
    seconds = n_bytes * n_devices / (HOST_GBPS * GIGA)
    devices, take = (f"{n_devices} devices per host", "take") if n_devices > 1 else ("one device", "takes")
    note = f"its share of a save; {devices} at {HOST_GBPS:g} GB/s {take} {seconds:,.1f} s"
    return "checkpoint", figures.gib("checkpoint", n_bytes), note


def _whether_it_fits(job: Job, parts: Mapping[str, float], total: float) -> list[tuple[str, Figure, str]]:
    """Returns the answer with the largest part, and what is left or short with what would help."""
    available = capacity(job)
    largest = max(parts, key=lambda name: parts[name])
    fits, left = total <= available, available - total
    answer = "NO" if not fits else "yes, barely" if left < BARELY * available else "yes"
    share = f"largest part: {largest.replace('_', ' ')}, {parts[largest] / total:.0%}"
    grows = (
        "config.pipeline.micro_batches" if largest in GROWS_WITH_MICRO_BATCH else "devices, or a config.sharding rule"
    )
    note = "for compiler, runtime and communication: not counted here" if fits else f"give more {grows}"
    difference = replace(figures.gib("left", left), text=units.binary(abs(left)))
    return [
        ("does it fit?", Figure("fits", fits, answer, DERIVED), share),
        ("  left" if fits else "  short by", difference, note),
    ]


def _memory_notes(job: Job) -> dict[str, str]:
    """Returns a remark for each part of the memory."""
    recipe, at = job.recipe, job.layout
    low = f" and {recipe.low_precision_copy:.0f} B in FP8" if recipe.low_precision_copy else ""
    alike = "; as much on every rank as the fullest needs" if job.shares_vocabulary else ""
    halved = f", {recipe.moments / 2:.0f} B of matrices" if recipe.muon else ""
    made = f"{recipe.weights if recipe.alike else recipe.gradients:.0f} B per parameter"
    each = f"{made}, and their sums over micro-batches" if has_sums(job) else made
    flight = "+".join(str(min(share.in_flight, at.micro_batches)) for share in job.ranks[0])
    return {
        "weights": f"as a step reads them: {_read(job):.0f} B per parameter of matrices{low}{alike}",
        "gradients": each,
        "pipeline_copy": "weights and gradients of the second direction",
        "masters": "float32 weights, divided over the replicas (ZeRO-1)",
        "optimizer": f"{recipe.moments:.0f} B per parameter{halved}, likewise",
        "adapters": f"{job.n_adapter_numbers:,} numbers, which alone are trained; {_made_of(job)}",
        "activations": f"policy {recipe.remat}; rank 0 has {flight} micro-batches in flight",
        "buffers": f"policy {recipe.remat}; slots of the pipeline's pools, on every rank",
        "kept_once": "independent of the batch: gate and up of experts side by side, masks",
        "layer_at_work": "intermediates of the widest layer's backward pass",
        "logits": "float32, of one chunk, and their gradient",
        "exchange_buffers": "tokens on their way to experts and back",
        "gathered_entries": "of whole sequences, what a layer's keys and values are made of, and gradients",
    }


def _made_of(job: Job) -> str:
    """Returns what the matrices with adapters take, as text."""
    if job.recipe.remat == "block":
        return "what they make of matrices exists for a layer at a time"
    return f"and the {job.adapted:,} of matrices with their products added (config.run.remat=block keeps none)"


def _read(job: Job) -> float:
    """Returns the bytes per number of the blocks' matrices as a step gathers them: codes if it gathers any in codes."""
    codes = job.recipe.in_codes
    return codes if any(job.read(part) == codes for parts in job.parts for part in parts) else job.recipe.weights


def traffic(job: Job) -> Section:
    """Returns what the busiest device sends per step."""
    found = max((rank_traffic(job, rank) for rank in range(len(job.ranks))), key=lambda t: t.total)
    rows = [_traffic_row(job, name, sent) for name, sent in vars(found).items() if sent.total]
    if not rows:
        none = Figure("total_gb", 0.0, "none", DERIVED)
        rows = [Row("sent", (none, none, replace(none, key="total_s")), "one device")]
    links = (f"network, {job.chip.network:g} GB/s", f"fast link, {job.chip.fast:g} GB/s", "time")
    columns = tuple(Column(name, DERIVED) for name in links)
    return Section("traffic", "sent per device and step", tuple(rows), columns)


def _traffic_row(job: Job, name: str, sent: Sent) -> Row:
    notes = {
        "exchange": f"{job.recipe.dispatch:.2f} B out, {job.recipe.combine:.2f} B back",
        "zero": f"{job.recipe.gradients:.0f} B out, {_read(job):.0f} B back",
        "fsdp": "weights stored in shards",
        "context": f"{job.recipe.activations:.0f} B out, float32 gradients back",
        "pipeline": f"{job.recipe.activations:.0f} B each way",
    }
    seconds = sent.seconds(job.chip)
    cells = (
        Figure(f"{name}_network_gb", sent.network / GIGA, figures.metric(sent.network, "B"), DERIVED),
        Figure(f"{name}_fast_gb", sent.fast / GIGA, figures.metric(sent.fast, "B"), DERIVED),
        Figure(f"{name}_s", seconds, figures.seconds(seconds), DERIVED),
    )
    return Row(TRAFFIC_LABELS[name], cells, notes[name])

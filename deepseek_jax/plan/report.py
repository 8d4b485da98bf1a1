"""All that is said of a plan, section by section."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from deepseek_jax.errors import UserError
from deepseek_jax.plan import figures, flops, step_time
from deepseek_jax.plan.activations import Kept
from deepseek_jax.plan.chips import CHIPS
from deepseek_jax.plan.cost import Speed, mfu_of_hours, saving
from deepseek_jax.plan.counts import Counts
from deepseek_jax.plan.figures import DERIVED, GIB, GIGA, GIVEN, PUBLISHED, Column, Figure, Row, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.layout import describe_layers
from deepseek_jax.plan.memory import BARELY, capacity, gradient_copies, rank_memory
from deepseek_jax.plan.network import AHEAD, EMBEDDING, HEAD, Network
from deepseek_jax.plan.published import Run
from deepseek_jax.plan.schedules import SCHEDULES, schedule
from deepseek_jax.plan.traffic import rank_traffic
from deepseek_jax.plan.verdict import above

GROWS_WITH_MICRO_BATCH = ("activations", "layer_at_work", "exchange_buffers")
PUBLISHED_MFU = {"router": False, "ahead": False}  # what the published operations leave out


@dataclass(frozen=True)
class Subject:
    """A network with what is known of it."""

    name: str
    network: Network
    counts: Counts
    cache_bytes: int
    run: Run | None


@dataclass(frozen=True)
class Question:
    """What is asked about a job.

    Attributes:
        kept: what a layer keeps for the backward pass (`activations.kept`).
        loss_chunk: tokens whose logits exist at a time.
        efficiency, efficiency_mark: of the calibrated column, and whether it is fitted or given.
        step_s, step_mark: a measured step and who measured it; None: no such column.
        tokens, tokens_mark: of a whole run.
        dollars: price of a GPU hour.
        against: something to compare with, or None.
    """

    kept: Mapping[str, Kept]
    loss_chunk: int
    efficiency: float
    efficiency_mark: str
    step_s: float | None
    step_mark: str
    tokens: float
    tokens_mark: str
    dollars: float
    against: Subject | None


def memory_of(job: Job, question: Question) -> list[dict[str, float]]:
    """Bytes by part on a device of each rank of the pipeline."""
    ranks = range(len(job.ranks))
    return [rank_memory(job, rank, question.kept, question.loss_chunk) for rank in ranks]


def report(subject: Subject, job: Job, question: Question) -> list[Section]:
    """Every section, in the order in which they are read."""
    sections = [
        parameters(subject),
        operations(subject.network, job),
        layout(job),
        memory(job, memory_of(job, question)),
        traffic(job),
        *([schedules(job, question)] if job.layout.pipe > 1 else []),
        speed(subject, job, question),
    ]
    sections += [published(subject, question)] if subject.run else []
    sections += [compared(subject, job, question.against)] if question.against else []
    return sections


def parameters(subject: Subject) -> Section:
    """Counts and the size of the cache."""
    c, count = subject.counts, figures.count
    published = count("active_parameters_without_embedding", c.active_without_embedding)
    rows = [
        ("in all", count("total_parameters", c.total), "main model, embedding and head included"),
        ("work on a token", count("active_parameters", c.active), "top_k of the routed experts, all the rest"),
        ("the same without the embedding", published, "the convention of the numbers published of V2 and V3"),
        ("embedding", count("embedding_parameters", c.embedding), "a table: one row is read for a token"),
        ("head", count("head_parameters", c.head), ""),
    ]
    if c.experts:
        rows.append(("routed experts", count("expert_parameters", c.experts), ""))
    if c.ahead_total:
        note = "besides; without the embedding and head it shares"
        rows.append(("multi-token prediction", count("mtp_parameters", c.ahead_total), note))
        rows.append(("  work on a token", count("mtp_active_parameters", c.ahead_active), ""))
    if c.router_biases:
        rows.append(("router biases", figures.plain("router_biases_count", c.router_biases), ""))
    cache = Figure("kv_cache_bytes_per_token", subject.cache_bytes, f"{subject.cache_bytes:,} B", DERIVED)
    rows.append(("key-value cache a token", cache, "bfloat16, from the shapes that prefill keeps"))
    return figures.column("parameters", "parameters", rows)


def operations(network: Network, job: Job) -> Section:
    """Operations of a token, attention counted in full and causally."""
    seq_len = job.layout.seq_len
    full, causal = (flops.forward(network, seq_len, causal=causal) for causal in (False, True))

    def both(key: str, label: str, values: Sequence[float], note: str = "") -> Row:
        cells = (Figure(f"{key}_gflop_per_token", v / GIGA, figures.metric(v, "FLOP"), DERIVED) for v in values)
        return Row(label, tuple(cells), note)

    rows = [
        both("forward_blocks", "forward: matrices of the blocks", (full.blocks, causal.blocks), "2 for each number"),
        both("forward_head", "forward: head", (full.head, causal.head)),
        both(
            "forward_attention",
            "forward: attention",
            (full.attention, causal.attention),
            f"{network.flops_per_pair:,} a pair and layer; {seq_len:,} keys, causally half",
        ),
        both("forward_router", "forward: routers", (full.router, causal.router)),
        both("forward_mtp", "forward: multi-token prediction", (full.ahead, causal.ahead)),
    ]
    rows = [row for row in rows if any(figure.value for figure in row.figures)]
    main, everything = (
        [flops.training(network, seq_len, causal=causal, **parts) for causal in (False, True)]
        for parts in (PUBLISHED_MFU, {})
    )
    if everything != main:
        note = "3 x forward, as a training log counts"
        rows.append(both("training_all", "training: all of these", everything, note))
    note = "the same of blocks, head, attention only: as published"
    rows.append(both("training", "training", main, note))
    again = step_time.recomputed_flops(job)
    rows.append(
        Row(
            "recomputed besides",
            (Figure("recomputed_gflop_per_token", again / GIGA, figures.metric(again, "FLOP"), DERIVED),) * 2,
            f"policy {job.recipe.remat}; part of no MFU",
        )
    )
    return Section(
        "operations",
        "operations a token",
        tuple(rows),
        (Column("in full", DERIVED, "full"), Column("causal", DERIVED, "causal")),
    )


def layout(job: Job) -> Section:
    """How devices, sequences and layers are divided."""
    at, plain = job.layout, figures.plain
    sequences = f"{at.batch:,} sequences of {at.seq_len:,}"
    micro_batch = f"of {at.sequences} x {at.seq_len:,} tokens on a device"
    rows = [
        ("devices", plain("devices_count", at.devices, mark=GIVEN), _mesh_text(job)),
        ("tokens a step", plain("tokens_per_step_count", at.tokens_per_step), sequences),
        ("micro-batches of each pipeline", plain("micro_batches_count", at.micro_batches), micro_batch),
    ]
    if len(job.stages) > 1:
        layers = Figure("layers_per_stage", [s.n_layers for s in job.stages], describe_layers(job.stages), DERIVED)
        rows.append(("layers of the stages", layers, "each to the device that has least to do"))
        for rank in sorted({0, at.pipe - 1}):
            holds = _holds(job, rank)
            rows.append((f"  rank {rank}", Figure(f"rank_{rank}", holds, "", DERIVED), holds))
    return figures.column("layout", "layout", rows)


def memory(job: Job, ranks: Sequence[Mapping[str, float]]) -> Section:
    """What the fullest device holds, and whether that fits."""
    totals = [sum(parts.values()) for parts in ranks]
    fullest, emptiest = totals.index(max(totals)), totals.index(min(totals))
    parts, total, available = ranks[fullest], totals[fullest], capacity(job)
    notes = _memory_notes(job)
    rows = [(name.replace("_", " "), figures.gib(name, n), notes.get(name, "")) for name, n in parts.items()]
    where = "every device" if len(set(totals)) == 1 else f"rank {fullest}: {_holds(job, fullest)}"
    rows.append(("in all, on the fullest device", figures.gib("total", total), where))
    if len(ranks) > 1:
        rows.append(("on the emptiest", figures.gib("emptiest_total", totals[emptiest]), f"rank {emptiest}"))
    known = PUBLISHED if job.chip in CHIPS.values() else GIVEN
    rows.append((f"memory of {job.chip.name}", figures.gib("chip_memory", available, known), ""))
    largest = max(parts, key=parts.get)
    fits, left = total <= available, available - total
    answer = "NO" if not fits else "yes, barely" if left < BARELY * available else "yes"
    share = f"largest part: {largest.replace('_', ' ')}, {parts[largest] / total:.0%}"
    rows.append(("does it fit?", Figure("fits", fits, answer, DERIVED), share))
    grows = "config.train.micro_batches" if largest in GROWS_WITH_MICRO_BATCH else "devices, or a config.sharding rule"
    note = "for compiler, runtime and communication: not counted here" if fits else f"give more {grows}"
    difference = replace(figures.gib("left", left), text=figures.binary(abs(left)))
    rows.append(("  left" if fits else "  short of", difference, note))
    return figures.column("memory", "memory of a device", rows)


def traffic(job: Job) -> Section:
    """What the busiest device sends in a step."""
    found = max((rank_traffic(job, rank) for rank in range(len(job.ranks))), key=lambda t: t.total)
    notes = {
        "exchange": f"{job.recipe.dispatch:.2f} B out, {job.recipe.combine:.2f} B back",
        "zero": f"{job.recipe.gradients:.0f} B out, {job.recipe.gathered:.0f} B back",
        "fsdp": "weights stored in shards",
        "pipeline": f"{job.recipe.activations:.0f} B each way",
    }
    labels = {"exchange": "all-to-all", "zero": "ZeRO-1: scatter, gather", "fsdp": "FSDP", "pipeline": "p2p"}
    rows = []
    for name, sent in vars(found).items():
        if not sent.total:
            continue
        seconds = sent.seconds(job.chip)
        cells = (
            Figure(f"{name}_network_gb", sent.network / GIGA, figures.metric(sent.network, "B"), DERIVED),
            Figure(f"{name}_fast_gb", sent.fast / GIGA, figures.metric(sent.fast, "B"), DERIVED),
            Figure(f"{name}_s", seconds, figures.seconds(seconds), DERIVED),
        )
        rows.append(Row(labels[name], cells, notes[name]))
    if not rows:
        none = Figure("total_gb", 0.0, "none", DERIVED)
        rows = [Row("sent", (none, none, replace(none, key="total_s")), "one device")]
    links = (f"network, {job.chip.network:g} GB/s", f"fast link, {job.chip.fast:g} GB/s", "time")
    return Section("traffic", "a device sends in a step", tuple(rows), tuple(Column(name, DERIVED) for name in links))


def schedules(job: Job, question: Question) -> Section:
    """The schedules beside one another, on the same devices."""
    rows, mark = [], question.efficiency_mark
    for name, found in SCHEDULES.items():
        mine = " (this plan)" if found is job.schedule else ""
        try:
            other = replace(job, schedule=schedule(name, job.layout.pipe, job.layout.micro_batches))
            stages = len(other.stages)
        except UserError as error:
            empty = tuple(Figure(f"{name}_{key}", None, "-", DERIVED) for key in _SCHEDULE_KEYS)
            rows.append(Row(found.title, empty, str(error).partition(". ")[0].removeprefix(f"--schedule={name} ")))
            continue
        roofline, (rank, calibrated) = step_time.step(other), step_time.slowest(other, question.efficiency)
        largest = max(sum(parts.values()) for parts in memory_of(other, question))
        values = (
            (roofline.bubble, figures.seconds(roofline.bubble), DERIVED),
            (calibrated.bubble, figures.seconds(calibrated.bubble), mark),
            (100 * calibrated.bubble / calibrated.total, f"{calibrated.bubble / calibrated.total:.1%}", mark),
            (calibrated.total, figures.seconds(calibrated.total), mark),
            (largest / GIB, figures.binary(largest), DERIVED),
        )
        keyed = zip(_SCHEDULE_KEYS, values, strict=True)
        cells = tuple(Figure(f"{name}_{key}", *value) for key, value in keyed)
        rows.append(Row(found.title + mine, cells, f"{found.formula}, PP = {stages}; slowest: {_holds(other, rank)}"))
    names = ("bubble, roofline", "calibrated", "of the step", "step", "memory")
    columns = tuple(Column(name, mark if 0 < i < 4 else DERIVED) for i, name in enumerate(names))
    return Section("schedules", "pipeline schedules", tuple(rows), columns)


_SCHEDULE_KEYS = ("bubble_roofline_s", "bubble_calibrated_s", "bubble_percent", "step_calibrated_s", "memory_gib")


def speed(subject: Subject, job: Job, question: Question) -> Section:
    """A step by roofline, by the calibrated efficiency and as measured; utilisation, time and money that follow."""
    steps = [step_time.step(job), step_time.step(job, question.efficiency)]
    totals = [step.total for step in steps]
    columns = [Column("roofline", DERIVED, "roofline")]
    columns += [Column(f"efficiency {question.efficiency:g}", question.efficiency_mark, "calibrated")]
    if question.step_s is not None:
        totals.append(question.step_s)
        columns.append(Column(f"{question.step_mark} step", f"{DERIVED}/{question.step_mark}", "measured"))
    at = job.layout

    def row(key: str, label: str, values: Sequence[float], text: Callable[[float], str], note: str = "") -> Row:
        values = [*values, *[None] * (len(columns) - len(values))]
        texts = ["-" if value is None else text(value) for value in values]
        cells = zip(values, texts, columns, strict=True)
        return Row(label, tuple(Figure(key, value, shown, column.mark) for value, shown, column in cells), note)

    speeds = [Speed(total, at.tokens_per_step, at.devices) for total in totals]
    causal, full = (flops.training(subject.network, at.seq_len, causal=c, **PUBLISHED_MFU) for c in (True, False))
    log = flops.training(subject.network, at.seq_len)
    peak, is_given = f"of {job.chip.bf16:,.0f} TFLOP/s in bfloat16", question.step_s is not None
    overlap = "hidden under arithmetic if it can be" if job.schedule.overlaps else "not hidden by this schedule"
    slowest = "of the slowest device" + ("; float32 at bfloat16's rate" if job.recipe.activations == 4 else "")
    whole = row("step_s", "step", totals, figures.seconds)
    if question.step_s is not None:  # not computed from what was measured, but that itself
        measured = replace(whole.figures[-1], mark=question.step_mark)
        whole = replace(whole, figures=(*whole.figures[:-1], measured), note=f"the last one {question.step_mark}")
    rows = [
        row("compute_s", "arithmetic", [s.compute for s in steps], figures.seconds, slowest),
        row("exchange_s", "all-to-all, exposed", [s.exchange for s in steps], figures.seconds, overlap),
        row("bubble_s", "bubble", [s.bubble for s in steps], figures.seconds, job.schedule.formula),
        row("reduce_s", "ZeRO-1 and FSDP", [s.reduce for s in steps], figures.seconds, "not hidden"),
        row("optimizer_s", "optimiser", [s.optimizer for s in steps], figures.seconds, "its state through the memory"),
        whole,
    ]
    counts = [("mfu_percent", "MFU, attention in full", full, peak), ("mfu_causal_percent", "MFU, causal", causal, "")]
    counts += [("mfu_log_percent", "MFU, as a training log", log, "causal, all included")] if log != causal else []
    for key, label, work, note in counts:
        used = [100 * s.mfu(work, job.chip) for s in speeds]
        note = (note + above(max(used), job, in_full=work == full, is_given=is_given)).removeprefix("; ")
        rows.append(row(key, label, used, figures.percent, note))
    each = [s.flops_per_device(causal) / step_time.TERA for s in speeds]
    rows += [
        row("tflops_per_device", "a device does, causal", each, "{:,.1f} TFLOP/s".format),
        row("tokens_per_day_billion", "tokens a day", [s.tokens_per_day / GIGA for s in speeds], "{:,.2f} B".format),
        row("hours_per_trillion_tokens_h", "GPU hours for 1 T tokens", [s.hours() for s in speeds], "{:,.0f} h".format),
        row("days_per_trillion_tokens_d", "days for 1 T tokens", [s.days() for s in speeds], "{:,.2f} d".format),
    ]
    if question.tokens:
        run, mark = f"{figures.metric(question.tokens, '').strip()} tokens", f"tokens: {question.tokens_mark}"
        hours = [s.hours(question.tokens) for s in speeds]
        prices = [question.dollars * h for h in hours]
        rows += [
            row("run_hours_h", f"GPU hours for {run}", hours, "{:,.0f} h".format, mark),
            row("run_days_d", f"days for {run}", [s.days(question.tokens) for s in speeds], "{:,.1f} d".format),
            row(
                "run_cost_dollars",
                f"cost at ${question.dollars:,.2f} an hour",
                prices,
                "{:,.0f} $".format,
                "price: given",
            ),
        ]
    return Section("speed", "a step", tuple(rows), tuple(columns))


def published(subject: Subject, question: Question) -> Section:
    """What was published of the real run, and sums of it."""
    run, rows = subject.run, []

    def said(key: str, label: str, value: float, text: str, note: str = "", mark: str = PUBLISHED) -> None:
        rows.append((label, Figure(key, value, text, mark), note))

    computed = f"{DERIVED}/{PUBLISHED}"
    if run.step_time_s:
        note = f"{run.devices:,} {run.chip}, {run.batch:,} x {run.seq_len:,} tokens"
        said("step_s", "step", run.step_time_s, f"{run.step_time_s:.3f} s", note)
        for label, seconds in run.phases_s:
            said(f"phase_{label.replace(' ', '_')}_s", f"  {label}", seconds, f"{seconds:.2f} s")
    if run.mfu:
        said("mfu_percent", "MFU, attention in full", 100 * run.mfu, figures.percent(100 * run.mfu))
        said("mfu_causal_percent", "MFU, causal", 100 * run.mfu_causal, figures.percent(100 * run.mfu_causal))
    if run.hours_per_trillion:
        hours = run.hours_per_trillion
        said("hours_per_trillion_tokens_h", "GPU hours for 1 T tokens", hours, f"{hours:,.0f} h")
        work = flops.training(subject.network, run.seq_len, causal=True, **PUBLISHED_MFU)
        used = mfu_of_hours(hours, work, CHIPS[run.chip])
        text = figures.percent(100 * used)
        said("implied_mfu_causal_percent", "MFU that this implies", 100 * used, text, "causal", computed)
    for label, hours in run.hours:
        said(f"{label.replace('-', '_').replace(' ', '_')}_h", label, hours, f"{hours:,.0f} h")
    if run.hours:
        total = sum(hours for _, hours in run.hours)
        cost = total * question.dollars
        said("total_h", "in all", total, f"{total:,.0f} h", "the sum of these", computed)
        note = f"at ${question.dollars:,.2f} an hour; without research, as there"
        mark = computed if question.dollars == run.dollars_per_hour else f"{DERIVED}/{GIVEN}"
        said("total_cost_dollars", "cost", cost, f"{cost:,.0f} $", note, mark)
    rows.append(("source", Figure("source", run.source, "", PUBLISHED), run.source))
    return figures.column("published", "published", rows)


def compared(subject: Subject, job: Job, other: Subject) -> Section:
    """Changes from another model to this one: what the formulas say, and what was measured, if both were."""
    seq_len, rows = job.layout.seq_len, []

    def change(key: str, label: str, pair: Sequence[float], mark: str, note: str) -> None:
        value = saving(*pair)
        figure = Figure(f"{key}_change_percent", 100 * value, f"{100 * value:+.1f} %", mark)
        rows.append((label, figure, note.format(*pair)))

    pair = (subject, other)
    change("parameters", "parameters", [s.counts.total for s in pair], DERIVED, "{:,.0f} against {:,.0f}")
    active = [s.counts.active_without_embedding for s in pair]
    change("active_parameters", "work on a token", active, DERIVED, "{:,.0f} against {:,.0f}, without the embedding")
    cache = [s.cache_bytes for s in pair]
    change("kv_cache", "key-value cache a token", cache, DERIVED, "{:,} B against {:,} B, both in bfloat16")
    work = [flops.training(s.network, seq_len, **PUBLISHED_MFU) for s in pair]
    change("training_operations", "operations to train on a token", work, DERIVED, "{:.3e} against {:.3e}, causal")
    hours = [s.run.hours_per_trillion if s.run else None for s in pair]
    if all(hours):
        computed = f"{DERIVED}/{PUBLISHED}"
        note = "{:,.0f} h against {:,.0f} h for 1 T tokens, two published measurements"
        change("training_hours", "training cost: GPU hours", hours, computed, note)
        chips = [CHIPS[s.run.chip] for s in pair]
        used = [100 * mfu_of_hours(*known) for known in zip(hours, work, chips, strict=True)]
        note = "{:.1f} % against {:.1f} %: hours over operations, so hours fell by less than operations did"
        change("implied_mfu", "MFU that those hours imply", used, computed, note)
    return figures.column("compared", f"against {other.name}", rows)


def _mesh_text(job: Job) -> str:
    at = job.layout
    return f"pipe {at.pipe} x data {at.data} x expert {at.expert}"


def _holds(job: Job, rank: int) -> str:
    """What a rank of the pipeline holds, in words."""
    stages = [job.stages[hold.stage] for hold in job.ranks[rank]]
    parts = {w.part for stage in stages for w in stage.weights}
    names = ((EMBEDDING, "embedding"), (HEAD, "head"), (AHEAD, "multi-token prediction"))
    ends = [name for part, name in names if part in parts]
    layers = " + ".join(str(stage.n_layers) for stage in stages)
    return f"{layers} layers" + (f", {', '.join(ends)}" if ends else "")


def _memory_notes(job: Job) -> dict[str, str]:
    recipe, at = job.recipe, job.layout
    low = f" and {recipe.low_precision_copy:.0f} B in FP8" if recipe.low_precision_copy else ""
    summed = ", and their sums over micro-batches" if gradient_copies(job) > 1 else ""
    flight = "+".join(str(min(hold.in_flight, at.micro_batches)) for hold in job.ranks[0])
    return {
        "weights": f"{recipe.weights:.0f} B a number{low}",
        "gradients": f"{recipe.gradients:.0f} B a number{summed}",
        "pipeline_copy": "weights and gradients of the second direction",
        "optimiser": f"{recipe.optimizer:.0f} B a number, cut over the replicas (ZeRO-1)",
        "activations": f"policy {recipe.remat}; rank 0 has {flight} micro-batches in flight",
        "kept_once": "whatever the batch: weights in the compute dtype, masks",
        "layer_at_work": "what the widest layer's backward pass makes",
        "logits": "float32, of a chunk, and their gradient",
        "exchange_buffers": "tokens on their way to experts and back",
    }

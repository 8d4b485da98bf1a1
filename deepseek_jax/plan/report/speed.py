"""Time: a step by roofline, calibrated and as measured; utilization, throughput and cost; the pipeline schedules."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from deepseek_jax import units
from deepseek_jax.errors import UserError
from deepseek_jax.plan import figures, flops, step_time
from deepseek_jax.plan.cost import Speed
from deepseek_jax.plan.figures import DERIVED, GIB, GIGA, Column, Figure, Row, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.memory import fullest
from deepseek_jax.plan.report.inputs import PlannedModel, PlanOptions, contents
from deepseek_jax.plan.schedules import SCHEDULES, Schedule, schedule
from deepseek_jax.plan.verdict import above

SCHEDULE_KEYS = ("bubble_roofline_s", "bubble_calibrated_s", "bubble_percent", "step_calibrated_s", "memory_gib")


@dataclass(frozen=True)
class Table:
    """A table whose columns are different steps of one job."""

    columns: tuple[Column, ...]  # roofline, calibrated, and measured if a step was measured
    speeds: tuple[Speed, ...]  # the speed in each column

    def row(self, key: str, label: str, values: Sequence[float], text: Callable[[float], str], note: str = "") -> Row:
        """Returns a row of one value per column; columns beyond the last value stay empty."""
        cells = itertools.zip_longest(self.columns, values)
        figures = (Figure(key, v, "-" if v is None else text(v), column.mark) for column, v in cells)
        return Row(label, tuple(figures), note)


def speed(model: PlannedModel, job: Job, options: PlanOptions) -> Section:
    """Returns a step by roofline, by the calibrated efficiency and as measured, and what follows from each."""
    steps = [step_time.step(job), step_time.step(job, options.efficiency)]
    totals = [step.total for step in steps]
    columns = [Column("roofline", DERIVED, "roofline")]
    columns += [Column(f"efficiency {options.efficiency:g}", options.efficiency_mark, "calibrated")]
    if options.step_s is not None:
        totals.append(options.step_s)
        columns.append(Column(f"{options.step_mark} step", f"{DERIVED}/{options.step_mark}", "measured"))
    at = job.layout
    table = Table(tuple(columns), tuple(Speed(total, at.tokens_per_step, at.devices) for total in totals))
    rows = [
        *_parts(job, steps, table),
        _whole(options, totals, table),
        *_utilization(model, job, options, table),
        *_throughput(model, job, table),
        *(_run(options, table) if options.tokens else []),
    ]
    return Section("speed", "step", tuple(rows), table.columns)


def _parts(job: Job, steps: Sequence[step_time.Step], table: Table) -> list[Row]:
    """Returns where the time of a step goes."""
    seconds = figures.seconds
    overlap = "hidden behind arithmetic where possible" if job.schedule.overlaps else "not hidden by this schedule"
    slowest = "on the slowest device" + ("; float32 at the rate of bfloat16" if job.recipe.activations == 4 else "")
    of_context = [s.context for s in steps]
    gathered = [table.row("context_s", "gathering over context", of_context, seconds, "not hidden")]
    return [
        table.row("compute_s", "arithmetic", [s.compute for s in steps], seconds, slowest),
        table.row("exchange_s", "all-to-all, exposed", [s.exchange for s in steps], seconds, overlap),
        table.row("bubble_s", "bubble", [s.bubble for s in steps], seconds, step_time.bubble_rule(job)),
        table.row("reduce_s", "ZeRO-1 and FSDP", [s.reduce for s in steps], seconds, "not hidden"),
        *(gathered if any(of_context) else []),
        table.row("optimizer_s", "optimizer", [s.optimizer for s in steps], seconds, "its state through the memory"),
    ]


def _whole(options: PlanOptions, totals: Sequence[float], table: Table) -> Row:
    """Returns the row of the whole step, in which a measured step keeps its own mark."""
    row = table.row("step_s", "step", totals, figures.seconds)
    if options.step_s is None:
        return row
    measured = replace(row.figures[-1], mark=options.step_mark)
    return replace(row, figures=(*row.figures[:-1], measured), note=f"the last one is {options.step_mark}")


def _utilization(model: PlannedModel, job: Job, options: PlanOptions, table: Table) -> list[Row]:
    """Returns MFU with full and causal attention as published, and as the training log counts if that differs."""
    seq_len = job.layout.seq_len
    causal, full = (flops.training(model.network, seq_len, causal=c, **flops.PUBLISHED_MFU) for c in (True, False))
    log = flops.training(model.network, seq_len)
    peak = f"of {job.chip.bf16:,.0f} TFLOP/s in bfloat16"
    counts = [("mfu_percent", "MFU, full attention", full, peak), ("mfu_causal_percent", "MFU, causal", causal, "")]
    if log != causal:
        counts.append(("mfu_log_percent", "MFU, as in the training log", log, "causal, everything included"))
    rows = []
    for key, label, work, note in counts:
        used = [100 * s.mfu(work, job.chip) for s in table.speeds]
        reason = above(max(used), job, in_full=work == full, is_given=options.step_s is not None)
        rows.append(table.row(key, label, used, figures.percent, (note + reason).removeprefix("; ")))
    return rows


def _throughput(model: PlannedModel, job: Job, table: Table) -> list[Row]:
    """Returns operations per device, tokens per day, and GPU hours and days per 10^12 tokens."""
    causal = flops.training(model.network, job.layout.seq_len, causal=True, **flops.PUBLISHED_MFU)
    speeds = table.speeds
    each = [s.flops_per_device(causal) / step_time.TERA for s in speeds]
    hours, days = [s.hours() for s in speeds], [s.days() for s in speeds]
    per_day = [s.tokens_per_day / GIGA for s in speeds]
    return [
        table.row("tflops_per_device", "per device, causal", each, "{:,.1f} TFLOP/s".format),
        table.row("tokens_per_day_billion", "tokens per day", per_day, "{:,.2f} B".format),
        table.row("hours_per_trillion_tokens_h", "GPU hours per 1 T tokens", hours, "{:,.0f} h".format),
        table.row("days_per_trillion_tokens_d", "days per 1 T tokens", days, "{:,.2f} d".format),
    ]


def _run(options: PlanOptions, table: Table) -> list[Row]:
    """Returns GPU hours, days and cost of the whole run."""
    run, mark = f"{figures.metric(options.tokens, '').strip()} tokens", f"tokens: {options.tokens_mark}"
    hours = [s.hours(options.tokens) for s in table.speeds]
    days = [s.days(options.tokens) for s in table.speeds]
    costs, price = [options.dollars * h for h in hours], f"cost at ${options.dollars:,.2f} per hour"
    return [
        table.row("run_hours_h", f"GPU hours for {run}", hours, "{:,.0f} h".format, mark),
        table.row("run_days_d", f"days for {run}", days, "{:,.1f} d".format),
        table.row("run_cost_dollars", price, costs, "{:,.0f} $".format, "price: given"),
    ]


def schedules(job: Job, options: PlanOptions) -> Section:
    """Returns a comparison of the pipeline schedules on the same devices."""
    rows = [_schedule_row(job, options, name, found) for name, found in SCHEDULES.items()]
    names = ("bubble, roofline", "calibrated", "of the step", "step", "memory")
    columns = tuple(Column(name, options.efficiency_mark if 0 < i < 4 else DERIVED) for i, name in enumerate(names))
    return Section("schedules", "pipeline schedules", tuple(rows), columns)


def _schedule_row(job: Job, options: PlanOptions, name: str, found: Schedule) -> Row:
    """Returns bubbles, step and memory under one schedule, or why it does not suit the devices."""
    try:
        other = replace(job, schedule=schedule(name, job.layout.pipe, job.layout.micro_batches))
        stages = len(other.stages)
    except UserError as error:
        empty = tuple(Figure(f"{name}_{key}", None, "-", DERIVED) for key in SCHEDULE_KEYS)
        return Row(found.title, empty, str(error).partition(". ")[0].removeprefix(f"--schedule={name} "))
    roofline, (rank, calibrated) = step_time.step(other), step_time.slowest(other, options.efficiency)
    largest, mark = fullest(other, options.kept, options.loss_chunk), options.efficiency_mark
    values = (
        (roofline.bubble, figures.seconds(roofline.bubble), DERIVED),
        (calibrated.bubble, figures.seconds(calibrated.bubble), mark),
        (100 * calibrated.bubble / calibrated.total, f"{calibrated.bubble / calibrated.total:.1%}", mark),
        (calibrated.total, figures.seconds(calibrated.total), mark),
        (largest / GIB, units.binary(largest), DERIVED),
    )
    cells = tuple(Figure(f"{name}_{key}", *value) for key, value in zip(SCHEDULE_KEYS, values, strict=True))
    mine = " (this plan)" if found is job.schedule else ""
    rule = step_time.bubble_rule(other)
    return Row(found.title + mine, cells, f"{rule}, PP = {stages}; slowest: {contents(other, rank)}")

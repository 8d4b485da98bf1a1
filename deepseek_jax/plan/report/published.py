"""What was published about the real run, and comparisons with another model."""

from collections.abc import Sequence

from deepseek_jax.chips import CHIPS
from deepseek_jax.plan import figures, flops
from deepseek_jax.plan.cost import mfu_of_hours
from deepseek_jax.plan.figures import DERIVED, GIVEN, PUBLISHED, Figure, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.published import Run
from deepseek_jax.plan.report.inputs import PlannedModel, PlanOptions

COMPUTED = f"{DERIVED}/{PUBLISHED}"
Cells = tuple[str, Figure, str]


def published(model: PlannedModel, run: Run, options: PlanOptions) -> Section:
    """Returns what was published about the real run, and sums of it."""
    source = ("source", Figure("source", run.source, "", PUBLISHED), run.source)
    rows = [*_step(run), *_efficiency(model, run), *_hours(run, options), source]
    return figures.column("published", "published", rows)


def _cells(key: str, label: str, value: float, text: str, note: str = "", mark: str = PUBLISHED) -> Cells:
    return label, Figure(key, value, text, mark), note


def _step(run: Run) -> list[Cells]:
    """Returns the published step and where its time went."""
    if not run.step_time_s:
        return []
    note = f"{run.devices:,} {run.chip}, {run.batch:,} x {run.seq_len:,} tokens"
    phases = [
        _cells(f"phase_{label.replace(' ', '_')}_s", f"  {label}", seconds, f"{seconds:.2f} s")
        for label, seconds in run.phases_s
    ]
    return [_cells("step_s", "step", run.step_time_s, f"{run.step_time_s:.3f} s", note), *phases]


def _efficiency(model: PlannedModel, run: Run) -> list[Cells]:
    """Returns the published MFU, or the one that published GPU hours imply."""
    rows = []
    if run.mfu and run.mfu_causal:
        rows.append(_cells("mfu_percent", "MFU, full attention", 100 * run.mfu, figures.percent(100 * run.mfu)))
        causal = 100 * run.mfu_causal
        rows.append(_cells("mfu_causal_percent", "MFU, causal", causal, figures.percent(causal)))
    if run.hours_per_trillion:
        hours = run.hours_per_trillion
        rows.append(_cells("hours_per_trillion_tokens_h", "GPU hours per 1 T tokens", hours, f"{hours:,.0f} h"))
        work = flops.training(model.network, run.seq_len, causal=True, **flops.PUBLISHED_MFU)
        used = 100 * mfu_of_hours(hours, work, CHIPS[run.chip])
        key, label = "implied_mfu_causal_percent", "MFU implied by these hours"
        rows.append(_cells(key, label, used, figures.percent(used), "causal", COMPUTED))
    return rows


def _hours(run: Run, options: PlanOptions) -> list[Cells]:
    """Returns GPU hours by stage, their sum and its cost."""
    rows = [
        _cells(f"{label.replace('-', '_').replace(' ', '_')}_h", label, hours, f"{hours:,.0f} h")
        for label, hours in run.hours
    ]
    if not rows:
        return []
    total = sum(hours for _, hours in run.hours)
    cost = total * options.dollars
    note = f"at ${options.dollars:,.2f} per hour; research not included, as in the report"
    mark = COMPUTED if options.dollars == run.dollars_per_hour else f"{DERIVED}/{GIVEN}"
    rows.append(_cells("total_h", "total", total, f"{total:,.0f} h", "the sum of these", COMPUTED))
    return [*rows, _cells("total_cost_dollars", "cost", cost, f"{cost:,.0f} $", note, mark)]


def compared(model: PlannedModel, job: Job, other: PlannedModel) -> Section:
    """Returns the changes from another model to this one: by formula, and as measured if both were."""
    pair = (model, other)
    work = [flops.training(m.network, job.layout.seq_len, **flops.PUBLISHED_MFU) for m in pair]
    active, cache = [m.counts.active_without_embedding for m in pair], [m.cache_bytes for m in pair]
    rows = [
        _change("parameters", "parameters", [m.counts.total for m in pair], "{:,.0f} against {:,.0f}"),
        _change("active_parameters", "active per token", active, "{:,.0f} against {:,.0f}, without the embedding"),
        _change("kv_cache", "key-value cache per token", cache, "{:,} B against {:,} B, both in bfloat16"),
        *_coded(pair),
        _change("training_operations", "training operations per token", work, "{:.3e} against {:.3e}, causal"),
    ]
    runs = [m.run for m in pair if m.run]
    hours = [run.hours_per_trillion for run in runs if run.hours_per_trillion]
    if len(hours) == len(pair):
        note = "{:,.0f} h against {:,.0f} h per 1 T tokens, two published measurements"
        rows.append(_change("training_hours", "training cost: GPU hours", hours, note, COMPUTED))
        chips = [CHIPS[run.chip] for run in runs]
        used = [100 * mfu_of_hours(*known) for known in zip(hours, work, chips, strict=True)]
        note = "{:.1f} % against {:.1f} %: hours per operation, which is why hours fell by less than operations"
        rows.append(_change("implied_mfu", "MFU implied by those hours", used, note, COMPUTED))
    return figures.column("compared", f"against {other.name}", rows)


def _coded(pair: Sequence[PlannedModel]) -> list[Cells]:
    """Returns the change of caches in FP8, if both models have one."""
    sizes = [m.fp8_cache_bytes for m in pair if m.fp8_cache_bytes]
    if len(sizes) < len(pair):
        return []
    note = f"{{:,}} B against {{:,}} B: {sizes[0] / sizes[1]:.1%} of it"
    return [_change("fp8_cache", "  in FP8", sizes, note)]


def _change(key: str, label: str, pair: Sequence[float], note: str, mark: str = DERIVED) -> Cells:
    """Returns the change from the second number of a pair to the first, in percent."""
    value = 100 * (pair[0] / pair[1] - 1)
    return label, Figure(f"{key}_change_percent", value, f"{value:+.1f} %", mark), note.format(*pair)

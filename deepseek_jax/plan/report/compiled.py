"""A compiled step beside the plan: memory per device, collectives, and what compiling took."""

from deepseek_jax.plan import figures
from deepseek_jax.plan.compiled import IN_HLO, CompiledStep
from deepseek_jax.plan.figures import COMPILED, DERIVED, Column, Figure, Row, Section
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.memory import between_steps, between_switches, by_rank, carried
from deepseek_jax.plan.report.inputs import PlanOptions
from deepseek_jax.units import binary

AGREES = 0.15  # part of the compiled bytes by which a plan may differ


def compiled(job: Job, step: CompiledStep, options: PlanOptions) -> list[Section]:
    """Returns the memory beside that of the plan's fullest device, the collectives, and the time."""
    return [memory(job, step, options), sent(step), compiling(step)]


def memory(job: Job, step: CompiledStep, options: PlanOptions) -> Section:
    """Returns the memory of a device: planned for the fullest one, compiled, and where they differ."""
    ranks = by_rank(job, options.kept, options.loss_chunk)
    totals = [sum(parts.values()) for parts in ranks]
    passed = between_switches(job, options.kept) if on_cpu(step) else 0.0
    rank, total = totals.index(max(totals)), max(totals) + passed
    kept, loop = between_steps(job, rank), carried(job, ranks[rank], rank)
    batch = 5 * 4.0 * job.layout.tokens * job.layout.micro_batches  # ids, targets, segments, positions, weights
    rest = f"on a CPU {binary(passed)} pass from B to W, and products of bfloat16 are float32" if on_cpu(step) else ""
    pairs = [
        ("state", "weights and optimizer, between steps", kept, step.arguments - step.batch, "arguments, donated"),
        ("batch", "batch", batch, step.batch, "arguments"),
        ("carried", "from turn to turn of the loop", loop, step.carried, "buffers, sums of gradients; temporaries"),
        ("others", "while an op runs", total - kept - loop, step.temporaries + step.outputs - step.carried, rest),
        ("total", "total", total + batch, step.total, ""),
    ]
    columns = [Column("planned", DERIVED, "planned"), Column("compiled", COMPILED, "compiled")]
    columns.append(Column("planned - compiled", f"{DERIVED}/{COMPILED}", "difference"))
    return Section("compiled_memory", "memory, compiled", tuple(_row(*pair) for pair in pairs), tuple(columns))


def on_cpu(step: CompiledStep) -> bool:
    """Returns whether a step was compiled for emulated devices."""
    return step.target == "cpu"


def _row(key: str, label: str, planned: float, found: float, note: str) -> Row:
    """Returns a row, which says so if the numbers do not agree."""
    share = (planned - found) / found if found else 0.0
    differs = "" if abs(share) <= AGREES else f"differs by more than {AGREES:.0%}"
    difference = Figure(f"{key}_percent", 100 * share, f"{share:+.1%}", f"{DERIVED}/{COMPILED}")
    cells = (figures.gib(key, planned), figures.gib(key, found, COMPILED), difference)
    return Row(label, cells, "; ".join(filter(None, (differs, note))))


def sent(step: CompiledStep) -> Section:
    """Returns the collectives by kind and axes, of the pipeline rank that sends most."""
    rows = []
    for it in step.sent:
        key = f"{it.kind}_{'_'.join(it.axes)}"
        cells = (
            figures.plain(f"{key}_count", it.in_program, COMPILED),
            Figure(f"{key}_count", it.per_step, f"{it.per_step:,.0f}", COMPILED),
            Figure(f"{key}_gb", it.n_bytes / figures.GIGA, figures.metric(it.n_bytes, "B"), COMPILED),
        )
        rows.append(Row(f"{it.kind} over {', '.join(it.axes)}", cells))
    keys = {"in the program": "in_program", "per step": "per_step", "bytes sent per step": "sent"}
    columns = tuple(Column(name, COMPILED, key) for name, key in keys.items())
    return Section("compiled_collectives", "collectives of a device", tuple(rows), columns)


def compiling(step: CompiledStep) -> Section:
    """Returns what compiling took, and what XLA made of the collectives."""
    rows = [
        (name, Figure(f"{name}_s", seconds, figures.seconds(seconds), COMPILED), "")
        for name, seconds in step.seconds.items()
    ]
    total = sum(step.seconds.values())
    rows.append(
        ("total", Figure("total_s", total, figures.seconds(total), COMPILED), f"for {step.n_devices:,} devices")
    )
    rows.append(("peak memory", figures.gib("peak_memory", step.peak_bytes, COMPILED), "of the process that compiled"))
    traced = dict.fromkeys(step.in_hlo, 0)
    for it in step.sent:
        name = IN_HLO.get(it.kind, it.kind.replace("_", "-"))
        traced[name] = traced.get(name, 0) + it.in_program
    made = ", ".join(f"{step.in_hlo.get(name, 0)} {name} of {n}" for name, n in traced.items())
    rows.append(("instructions", figures.plain("instructions_count", step.n_instructions, COMPILED), made))
    return figures.column("compiling", "compiling", rows)

"""The pictures of `deepseek-jax plan`: the memory of each device along the pipeline, and a schedule."""

from pathlib import Path
from typing import Any

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.schedule import make_schedule
from deepseek_jax.parallel.simulate import simulate
from deepseek_jax.paths import check_local
from deepseek_jax.plan.figures import GIB
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.step_time import mean_times

COLORS = {"F": "#4c8bd0", "B": "#5bb48a", "W": "#9bd3b8", "BW": "#5bb48a", "FBW": "#e0a33e"}
NAMES = {"F": "forward", "B": "backward, input", "W": "backward, weights", "BW": "backward", "FBW": "both, overlapped"}


def memory(job: Job, ranks: list[dict[str, float]], name: str, file: str) -> None:
    """A bar for each device along the pipeline, part on part, and the chip's memory as a line."""
    figure = _figure("--picture", file, max(5.0, 2.5 + 0.45 * len(ranks)), 4.5)
    axes = figure.subplots()
    labels, height = [str(rank) for rank in range(len(ranks))], [0.0] * len(ranks)
    for part in dict.fromkeys(part for parts in ranks for part in parts):
        sizes = [parts.get(part, 0.0) / GIB for parts in ranks]
        axes.bar(labels, sizes, bottom=height, label=part.replace("_", " "), width=0.8)
        height = [low + size for low, size in zip(height, sizes, strict=True)]
    axes.axhline(job.chip.memory, color="black", linestyle="--", linewidth=1)
    axes.text(0, job.chip.memory, f" {job.chip.name}", va="bottom", ha="left", fontsize=8)
    axes.set(xlabel="device along the pipeline", ylabel="GiB", title=f"{name}: memory of a device")
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, "--picture", file)


def schedule(job: Job, name: str, efficiency: float, file: str) -> None:
    """What each device along the pipeline runs over the time of a step, with the mean times of the stages."""
    at = job.layout
    if at.pipe == 1:
        raise UserError(f"--draw={file}: there is no pipeline to draw. Set --config.mesh.pipe=2 or more.")
    made = make_schedule(name, at.pipe, at.micro_batches, job.put_off)
    spans = simulate(made, mean_times(job, efficiency).seconds)
    figure = _figure("--draw", file, 14.0, 1.5 + 0.28 * at.pipe)
    axes = figure.subplots()
    for op in COLORS:
        bars = [span for span in spans if "".join(part.kind for part in span.op) == op]
        for second in (False, True):  # the second chunk of a rank is paler
            for rank in range(at.pipe):
                mine = [s for s in bars if s.rank == rank and (s.op[0].chunk == 1) is second]
                times = [(span.begin, span.end - span.begin) for span in mine]
                label = NAMES[op] if rank == 0 and not second and mine else None
                alpha = 0.55 if second else 1.0
                axes.broken_barh(times, (rank - 0.42, 0.84), color=COLORS[op], alpha=alpha, label=label, linewidth=0)
    axes.set(
        xlabel="seconds",
        ylabel="device along the pipeline",
        title=f"{job.schedule.title}, {at.micro_batches} micro-batches",
    )
    axes.invert_yaxis()
    axes.legend(fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)
    _save(figure, "--draw", file)


def _figure(flag: str, file: str, width: float, height: float) -> Any:
    check_local(file, flag)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError(f'{flag} needs matplotlib. Install it: pip install "deepseek_jax[notebooks]"') from None
    if not Path(file).suffix:  # one would be added, and the file stand elsewhere than said
        raise UserError(f"{flag}={file}: expected a file that ends in .png, .svg or .pdf.")
    return Figure(figsize=(width, height), layout="constrained")


def _save(figure: Any, flag: str, file: str) -> None:
    try:
        figure.savefig(Path(file).expanduser(), dpi=150)
    except (OSError, ValueError) as error:
        raise UserError(f"{flag}={file}: cannot be written ({error}). Give a .png, .svg or .pdf.") from None

"""The live view of a run in a terminal: a bar, the figures, the loss or reward as a line of blocks; drawn by rich."""

from typing import TYPE_CHECKING, Any

from deepseek_jax.train.figures import FIGURES, LOG_ONLY, SPEED, columns
from deepseek_jax.units import duration

if TYPE_CHECKING:
    from deepseek_jax.train.metrics import Metrics

REDRAWS_PER_SECOND = 4
VIEW_WIDTH = 100  # columns; a view narrower than the window is not torn when the window shrinks a little
SPARKS = "▁▂▃▄▅▆▇█"


def open_live(metrics: "Metrics") -> Any:
    """Starts rich's live display: its own thread redraws, what others print goes above it."""
    from rich.console import Console
    from rich.live import Live

    console = Console(file=metrics.stream, force_terminal=True)

    def draw() -> Any:  # for the terminal's present width
        return view(metrics, min(console.width, VIEW_WIDTH), ascii_only=console.options.ascii_only)

    live = Live(get_renderable=draw, console=console, refresh_per_second=REDRAWS_PER_SECOND)
    live.start()
    return live


def view(metrics: "Metrics", width: int, ascii_only: bool) -> Any:
    """Returns the present state: bar, figures, sparkline of the loss or the reward."""
    from rich.columns import Columns
    from rich.console import Group
    from rich.panel import Panel
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    left, total = metrics.seconds_left, max(metrics.total_steps, 1)
    eta = "compiling" if not metrics.figures else "" if left is None else f"eta {duration(left)}"
    bar = Table.grid(padding=(0, 2), expand=True)
    bar.add_column(no_wrap=True)
    bar.add_column(ratio=1)
    bar.add_column(no_wrap=True, justify="right")
    progress = ProgressBar(total=total, completed=metrics.now)
    bar.add_row(metrics.heading(metrics.now), progress, f"{metrics.now / total:.0%}  {eta}")

    others = {name: (name, ".4g") for name in metrics.figures if name not in FIGURES and name not in LOG_ONLY}
    figures = columns(metrics.figures, FIGURES | others) + columns(metrics.speed, SPEED)
    held_out = [f"held-out {column}" for column in columns(metrics.held_out, FIGURES)]
    labelled = (column.split("=") for column in figures + held_out)
    cells = [Text.assemble((f"{label} ", "dim"), value, no_wrap=True) for label, value in labelled]
    parts: list[Any] = [bar, Columns(cells, padding=(0, 3), equal=True)]
    if len(metrics.curve_values) > 1 and not ascii_only:
        label = FIGURES[metrics.curve][0]
        parts.append(Text(f"{label} {_sparkline(list(metrics.curve_values))}", no_wrap=True, overflow="crop"))
    return Panel(Group(*parts), title=f"deepseek-jax {metrics.verb}", title_align="left", width=width)


def _sparkline(values: list[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)

"""The live view of a run in a terminal: a bar, the figures, the loss as a line of blocks; drawn by rich."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TextIO

from deepseek_jax.train.figures import FIGURES, LOG_ONLY, SPEED, columns
from deepseek_jax.units import duration

REDRAWS_PER_SECOND = 4
VIEW_WIDTH = 100  # columns; a view narrower than the window is not torn when the window shrinks a little
SPARKS = "▁▂▃▄▅▆▇█"


class Progress(Protocol):
    """What is drawn: see `train.metrics.Metrics`."""

    stream: TextIO
    now: int
    total_steps: int
    figures: Mapping[str, Any]
    speed: Mapping[str, float]
    held_out: Mapping[str, Any]
    losses: Sequence[float]

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the last step."""

    def heading(self, step: int) -> str:
        """How a step is called."""


def open_live(metrics: Progress) -> Any:
    """Starts rich's live display: its own thread redraws, what others print goes above it."""
    from rich.console import Console
    from rich.live import Live

    live = Live(
        _Drawing(metrics),
        console=Console(file=metrics.stream, force_terminal=True),
        refresh_per_second=REDRAWS_PER_SECOND,
        transient=False,
        vertical_overflow="ellipsis",
    )
    live.start()
    return live


class _Drawing:
    """The present state, drawn anew for the terminal's present width each time that rich asks for it."""

    def __init__(self, metrics: Progress):
        self._metrics = metrics

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        yield view(self._metrics, min(options.max_width, VIEW_WIDTH), ascii_only=options.ascii_only)


def view(metrics: Progress, width: int, ascii_only: bool) -> Any:
    """Returns the present state: bar, figures, sparkline of the loss."""
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
    cells = [_styled(*column.split("=")) for column in figures + held_out]
    parts: list[Any] = [bar, Columns(cells, padding=(0, 3), equal=True)]
    if len(metrics.losses) > 1 and not ascii_only:
        parts.append(Text(f"loss {_sparkline(list(metrics.losses))}", no_wrap=True, overflow="crop"))
    return Panel(Group(*parts), title="deepseek-jax train", title_align="left", width=width)


def _styled(label: str, value: str) -> Any:
    """Returns a figure of the live view, its label dimmed."""
    from rich.text import Text

    return Text.assemble((f"{label} ", "dim"), value, no_wrap=True)


def _sparkline(values: list[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)

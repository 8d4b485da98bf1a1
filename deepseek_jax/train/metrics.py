"""Progress of a run: a live view or plain lines, TensorBoard, and ``metrics.jsonl`` for exact comparison.

``metrics.jsonl`` holds one object a line.  What the mathematics decides stands at the top of the object, in full
precision (Python's ``repr`` of a float is exact), what the clock decides under ``"speed"``: two runs are the same
when their lines agree without ``"speed"``.  A resumed run first drops the lines later than the checkpoint.

A disk that is full stops no run: it is reported once, and the file that could not be written is given up.

A new run explains its figures once, when the first are shown.

Expert imbalance is MaxVio = (max_e load_e - mean load) / mean load per layer, averaged over the layers.
Paper: "Auxiliary-Loss-Free Load Balancing", section 4.1.
"""

import collections
import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from deepseek_jax.chips import peak_flops
from deepseek_jax.compat import peak_memory_bytes
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.layers.router import max_violation
from deepseek_jax.train.board import Board
from deepseek_jax.units import duration

# Figure -> (label, format), in the order in which they are shown.  The loss that is shown is that of the next token,
# which bits/byte is made of as well; the one that is minimised holds other losses too, with weights that change.
FIGURES = {
    "main": ("loss", ".4f"),
    "mtp": ("mtp", ".4f"),
    "bits_per_byte": ("bits/byte", ".4f"),
    "learning_rate": ("lr", ".2e"),
    "gradient_norm": ("grad_norm", ".3f"),
    "max_violation": ("maxvio", ".3f"),
    "skipped": ("skipped", "d"),
}
LEGEND = {
    "main": "how badly the next token is predicted, in nats per token",
    "mtp": "the same for the token after that, guessed by multi-token prediction with the next one given",
    "bits_per_byte": "the loss per byte of text, comparable between tokenizers; held-out: on text not trained on",
    "max_violation": "how far the busiest expert is above an even share: 0 is even, 1 is twice its share",
    "skipped": "steps left out since their loss or gradient was not finite: 0 is right",
}
LOG_ONLY = ("checksum", "skipped_in_row", "loss")  # written, never shown
SPEED = {
    "tokens_per_second": ("tokens/s", ".0f"),
    "mfu": ("mfu", ".1%"),
    "memory_gib": ("memory_gib", ".2f"),
}
REDRAWS_PER_SECOND = 4
VIEW_WIDTH = 100  # columns; a view narrower than the window is not torn when the window shrinks a little
SPARKS = "▁▂▃▄▅▆▇█"


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Returns loss / (ln 2 * bytes per token): a loss in nats per token, made comparable between tokenizers.

    Summed nats over summed bytes give the same.
    """
    return loss / (math.log(2) * bytes_per_token)


def memory_gib() -> float | None:
    """Returns the peak memory in GiB: of the first local device where it tells, else of this process on the host."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    peak = stats["peak_bytes_in_use"] if stats and "peak_bytes_in_use" in stats else peak_memory_bytes()
    return None if peak is None else peak / 2**30


def read_log(path: str | Path) -> list[dict]:
    """Returns the objects of a ``metrics.jsonl``; a torn line, left by a kill, is passed over."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and "step" in record:
                records.append(record)
    return records


class Metrics:
    """Writes the figures of a run; a context manager.

    Args:
      workdir: receives ``metrics.jsonl`` and ``tensorboard/``.
      total_steps: last step of the run.
      tokens_per_step: tokens of a step, unless ``step`` is told the number (batch ramp).
      start_step: step of the checkpoint resumed from; later lines of the log are dropped.  0 starts a new log.
      flops_per_token: forward and backward; with a known chip it gives the MFU.
      device_kind: ``jax.devices()[0].device_kind``.
      n_devices: devices of the run.
      stream: where progress goes, standard output by default.
      live: draw a live view; None: if ``stream`` is a terminal.
      enabled: False writes nothing (processes other than the first).
    """

    def __init__(
        self,
        workdir: str | Path,
        total_steps: int,
        tokens_per_step: int = 0,
        *,
        start_step: int = 0,
        flops_per_token: float = 0.0,
        device_kind: str = "",
        n_devices: int = 1,
        stream: TextIO | None = None,
        live: bool | None = None,
        enabled: bool = True,
    ):
        self.total_steps, self.tokens_per_step = total_steps, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, (peak_flops(device_kind) or 0.0) * n_devices
        self.enabled = enabled
        self.stream = sys.stdout if stream is None else stream
        self.now = start_step
        self.figures: dict[str, Any] = {}
        self.speed: dict[str, float] = {}
        self.held_out: dict[str, Any] = {}
        self.losses: collections.deque[float] = collections.deque(maxlen=48)
        self._start_step, self._tokens, self._paused_s = start_step, 0, 0.0
        self._window: collections.deque[tuple] = collections.deque(maxlen=20)  # (seconds, step, tokens so far)
        self._log = self._board = self._live = None
        self._is_explained = False
        if enabled:
            self._open(Path(workdir))
            if _is_terminal(self.stream) if live is None else live:
                self._live = _open_live(self)

    def __enter__(self) -> "Metrics":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def step(
        self,
        step: int,
        scalars: Mapping[str, float],
        per_layer: Mapping[str, Any] | None = None,
        tokens: int | None = None,
        rows: Sequence[str] | None = None,
    ) -> None:
        """Records training step ``step`` (the number of finished steps).

        Log the first step of a process by itself: its time, which holds the compilation, is not counted.

        Args:
          step: finished steps.
          scalars: figures as Python numbers; FIGURES names those that are shown, all are written.
          per_layer: name -> array [layers] or [layers, experts]; ``expert_load`` gives MaxVio.
          tokens: tokens since the last call; by default ``tokens_per_step`` for each step.
          rows: what the layers are called; by default layer_00, layer_01, ...
        """
        if not self.enabled:
            return
        layers = {name: np.asarray(value, np.float64) for name, value in (per_layer or {}).items()}
        figures = {name: _number(value) for name, value in scalars.items()}
        if "expert_load" in layers:
            layers["max_violation"] = np.asarray(max_violation(layers["expert_load"]))
            figures.setdefault("max_violation", float(layers["max_violation"].mean()))
        self._time(step, self.tokens_per_step * (step - self.now) if tokens is None else tokens)
        self.now, self.figures = step, {name: value for name, value in figures.items() if value != 0 or name != "mtp"}
        if math.isfinite(figures.get("main", math.nan)):
            self.losses.append(figures["main"])

        lists = {name: value.tolist() for name, value in layers.items() if value.ndim == 1}
        self._write({"step": step, "split": "train", **figures, "layers": lists, "speed": self.speed})
        n_rows = max((len(value) for value in layers.values()), default=0)
        self._chart(step, "train", figures, layers, rows or [f"layer_{row:02d}" for row in range(n_rows)], self.speed)
        self._explain()
        if self._live is None:
            eta = [] if self.seconds_left is None else [f"eta={duration(self.seconds_left)}"]
            shown = _columns(self.figures, FIGURES) + _columns(self.speed, SPEED)
            self._say("  ".join([self._heading(step), *shown, *eta]))

    def evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records figures on held-out text after ``step`` steps."""
        if not self.enabled:
            return
        figures = {name: _number(value) for name, value in scalars.items()}
        self.held_out = {"step": step, **figures}
        self._write({"step": step, "split": "held_out", **figures})
        self._chart(step, "held_out", figures)
        if self._live is None:
            self._say("  ".join([self._heading(step), "held-out", *_columns(figures, FIGURES)]))

    def message(self, text: str) -> None:
        """Prints a line, above the live view where there is one."""
        if not self.enabled:
            return
        if self._live is not None:
            self._live.console.print(text, markup=False, highlight=False)
        else:
            self._say(text)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Stops the clock of the throughput (evaluation, waiting for a checkpoint)."""
        begin = time.monotonic()
        try:
            yield
        finally:
            self._paused_s += time.monotonic() - begin

    def close(self) -> None:
        """Leaves the last state on the screen and closes the files; may be called twice."""
        live, self._live = self._live, None
        log, self._log = self._log, None
        board, self._board = self._board, None
        try:
            if live is not None:
                live.stop()  # draws once more
        finally:
            for file in (log, board):
                if file is not None:
                    try:
                        file.close()
                    except OSError as error:
                        self._say(f"the last figures are lost: {error.strerror}.")
            self.enabled = False

    @property
    def seconds_left(self) -> float | None:
        """Estimated time to the last step, None before the second record."""
        rate = self.speed.get("seconds_per_step")
        return None if rate is None else rate * max(self.total_steps - self.now, 0)

    def _open(self, workdir: Path) -> None:
        """Opens the log, cut back to ``start_step``, and TensorBoard."""
        path = workdir / "metrics.jsonl"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_log(path) if 0 < self._start_step >= record["step"]]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
            self._board = Board(workdir / "tensorboard", self._start_step)
            self._log = path.open("a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{workdir}: cannot write there ({error.strerror}). Choose another --workdir.") from error

    def _time(self, step: int, tokens: int) -> None:
        """Moves the window of the throughput; the first record only starts the clock."""
        self._tokens += tokens
        self._window.append((time.monotonic() - self._paused_s, step, self._tokens))
        (begin_s, begin_step, begin_tokens), (end_s, _, end_tokens) = self._window[0], self._window[-1]
        self.speed = {}
        if step > begin_step and end_s > begin_s:
            seconds = end_s - begin_s
            rate = (end_tokens - begin_tokens) / seconds
            self.speed = {"seconds_per_step": seconds / (step - begin_step), "tokens_per_second": rate}
            if self.flops_per_token and self.peak_flops:
                self.speed["mfu"] = rate * self.flops_per_token / self.peak_flops
        if (memory := memory_gib()) is not None:
            self.speed["memory_gib"] = memory

    def _write(self, record: dict) -> None:
        """Appends a line and hands it to the system, so that a kill loses none before the last."""
        if self._log is None:
            return
        try:
            self._log.write(json.dumps(_finite(record), allow_nan=False) + "\n")
            self._log.flush()
        except OSError as error:
            self._log = self._give_up(self._log, "metrics.jsonl", error)

    def _chart(self, *figures: Any) -> None:
        """Hands the arguments of ``Board.add`` to TensorBoard."""
        if self._board is None:
            return
        try:
            self._board.add(*figures)
        except OSError as error:
            self._board = self._give_up(self._board, "tensorboard", error)

    def _explain(self) -> None:
        """Says what the figures of a new run mean, before the first are shown."""
        if self._start_step or self._is_explained:
            return
        self._is_explained = True
        known = [name for name in LEGEND if name in self.figures]
        width = max((len(FIGURES[name][0]) for name in known), default=0)
        if known:
            self.message("\n".join(f"  {FIGURES[name][0]:<{width}}  {LEGEND[name]}" for name in known))

    def _give_up(self, file: Any, name: str, error: OSError) -> None:
        """Tells that a file of the run cannot be written any more, and closes it."""
        self.message(f"{name} ends at step {self.now}: {error.strerror}. Training goes on.")
        with contextlib.suppress(OSError):  # what it still holds cannot be written either
            file.close()

    def _heading(self, step: int) -> str:
        return f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk, a reader that has gone: the run matters more
            self.stream.write(line + "\n")
            self.stream.flush()

    def __rich_console__(self, console: Any, options: Any) -> Iterator[Any]:
        """Draws the live view for the terminal's present width."""
        yield _view(self, min(options.max_width, VIEW_WIDTH), ascii_only=options.ascii_only)


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, (bool, int, np.integer)) else float(value)


def _finite(value: Any) -> Any:
    """Replaces nan and inf, which JSON does not have, by their names; ``float`` reads them back."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _columns(figures: Mapping[str, Any], table: Mapping[str, tuple[str, str]]) -> list[str]:
    """Returns label=value of those figures that the table names, in its order."""
    return [f"{label}={_show(figures[name], form)}" for name, (label, form) in table.items() if name in figures]


def _show(value: int | float, form: str) -> str:
    return format(value, form if form != "d" or isinstance(value, int) else ".0f")


def _is_terminal(stream: TextIO) -> bool:
    return stream.isatty() and os.environ.get("TERM") != "dumb" and not os.environ.get("CI")


def _sparkline(values: list[float]) -> str:
    low, high = min(values), max(values)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((value - low) * scale)] for value in values)


def _open_live(metrics: Metrics) -> Any:
    """Starts rich's live display: its own thread redraws, what others print goes above it."""
    from rich.console import Console
    from rich.live import Live

    live = Live(
        metrics,
        console=Console(file=metrics.stream, force_terminal=True),
        refresh_per_second=REDRAWS_PER_SECOND,
        transient=False,
        vertical_overflow="ellipsis",
    )
    live.start()
    return live


def _view(metrics: Metrics, width: int, ascii_only: bool) -> Any:
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
    bar.add_row(metrics._heading(metrics.now), progress, f"{metrics.now / total:.0%}  {eta}")

    others = {name: (name, ".4g") for name in metrics.figures if name not in FIGURES and name not in LOG_ONLY}
    figures = _columns(metrics.figures, FIGURES | others) + _columns(metrics.speed, SPEED)
    held_out = [f"held-out {column}" for column in _columns(metrics.held_out, FIGURES)]
    cells = [_styled(*column.split("=")) for column in figures + held_out]
    parts: list[Any] = [bar, Columns(cells, padding=(0, 3), equal=True)]
    if len(metrics.losses) > 1 and not ascii_only:
        parts.append(Text(f"loss {_sparkline(list(metrics.losses))}", no_wrap=True, overflow="crop"))
    return Panel(Group(*parts), title="deepseek-jax train", title_align="left", width=width)


def _styled(label: str, value: str) -> Any:
    """Returns a figure of the live view, its label dimmed."""
    from rich.text import Text

    return Text.assemble((f"{label} ", "dim"), value, no_wrap=True)

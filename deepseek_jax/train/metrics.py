"""Progress of a run: a live view or plain lines, TensorBoard, and `metrics.jsonl` for exact comparison.

The loads of the experts at the step logged last are in `expert_load.json`, for `deepseek-jax plan --loads`.

`metrics.jsonl` holds one object per line: deterministic figures as top-level keys, in full precision, and under
`"speed"` what depends on the machine and the mesh. Two runs are the same when their lines agree without `"speed"`. A
resumed run first drops the lines later than the checkpoint. A full disk stops no run: it is reported once, and the file
that could not be written is given up.

Expert imbalance is MaxVio = (max_e load_e - mean load) / mean load per layer, averaged over the layers.
Paper: "Auxiliary-Loss-Free Load Balancing", section 4.1.
"""

import collections
import contextlib
import json
import math
import sys
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self, TextIO

import numpy as np

from deepseek_jax.chips import peak_flops
from deepseek_jax.compat import peak_memory_bytes
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_atomically
from deepseek_jax.layers.router import max_violation
from deepseek_jax.streams import is_terminal
from deepseek_jax.train.board import Board
from deepseek_jax.train.figures import FIGURES, LEGEND, SPEED, columns
from deepseek_jax.train.live import open_live
from deepseek_jax.train.wandb_run import WandbRun
from deepseek_jax.units import duration

EXPERT_LOADS = "expert_load.json"  # in a workdir: tokens of each expert in each layer, of the step logged last


def bits_per_byte(loss: float, bytes_per_token: float) -> float:
    """Returns loss / (ln 2 * bytes per token): a loss in nats per token, made comparable between tokenizers."""
    return loss / (math.log(2) * bytes_per_token)


def memory_gib() -> float | None:
    """Returns the peak memory in GiB: of the first local device where it tells, else of this process on the host."""
    import jax

    stats = jax.local_devices()[0].memory_stats()
    peak = stats["peak_bytes_in_use"] if stats and "peak_bytes_in_use" in stats else peak_memory_bytes()
    return None if peak is None else peak / 2**30


def read_log(path: str | Path) -> list[dict]:
    """Returns the objects of a `metrics.jsonl`; a torn line, left by a kill, is passed over."""
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
      workdir: receives `metrics.jsonl` and `tensorboard/`.
      total_steps: last step of the run.
      tokens_per_step: tokens of a step, unless `step` is given the number (batch ramp).
      start_step: step of the checkpoint resumed from; later lines of the log are dropped.  0 starts a new log.
      flops_per_token: forward and backward; with a known chip it gives the MFU.
      device_kind: `jax.devices()[0].device_kind`.
      n_devices: devices of the run.
      stream: where progress goes, standard output by default.
      live: draw a live view; None: if `stream` is a terminal.
      enabled: False writes nothing (processes other than the first).
      verb: heads the live view.
      charts: makes the run of another service that receives the figures as well.
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
        verb: str = "train",
        charts: Callable[[], WandbRun] | None = None,
    ):
        self.total_steps, self.tokens_per_step = total_steps, tokens_per_step
        self.flops_per_token, self.peak_flops = flops_per_token, (peak_flops(device_kind) or 0.0) * n_devices
        self.enabled = enabled
        self.stream = sys.stdout if stream is None else stream
        self.now = start_step
        self.figures: dict[str, Any] = {}
        self.speed: dict[str, float] = {}
        self.held_out: dict[str, Any] = {}
        self.verb, self.curve = verb, ""  # the figure that the live view draws: the loss, or the reward
        self.curve_values: collections.deque[float] = collections.deque(maxlen=48)
        self._start_step, self._tokens, self._paused_s = start_step, 0, 0.0
        self._window: collections.deque[tuple] = collections.deque(maxlen=20)  # (seconds, step, tokens so far)
        self._log: TextIO | None = None
        self._board: Board | None = None
        self._loads: Path | None = None
        self._live: Any = None
        self._is_explained = False
        if enabled:
            self._open(Path(workdir), charts() if charts else None)
            if is_terminal(self.stream) if live is None else live:
                self._live = open_live(self)

    def __enter__(self) -> Self:
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
        exchange: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        """Records a training step. The time of the first record of a process, which compiles, is not counted.

        Args:
          step: finished steps.
          scalars: figures as Python numbers; FIGURES names those that are shown, all are written.
          per_layer: name -> array [layers] or [layers, experts]; `expert_load` gives MaxVio.
          tokens: tokens since the last call; by default `tokens_per_step` for each step.
          rows: what the layers are called; by default layer_00, layer_01, ...
          exchange: figures of the exchange of tokens between devices; written under "speed".
        """
        if not self.enabled:
            return
        layers = {name: np.asarray(value, np.float64) for name, value in (per_layer or {}).items()}
        figures = {name: _number(value) for name, value in scalars.items()}
        if "expert_load" in layers:
            layers["max_violation"] = np.asarray(max_violation(layers["expert_load"]))
            figures.setdefault("max_violation", float(layers["max_violation"].mean()))
        self._time(step, self.tokens_per_step * (step - self.now) if tokens is None else tokens)
        self.speed |= {name: _number(value) for name, value in exchange.items()}
        self.now, self.figures = step, {name: value for name, value in figures.items() if value != 0 or name != "mtp"}
        self.curve = "main" if "main" in figures else "reward"
        if math.isfinite(value := figures.get(self.curve, math.nan)):
            self.curve_values.append(value)

        lists = {name: value.tolist() for name, value in layers.items() if value.ndim == 1}
        self._write({"step": step, "split": "train", **figures, "layers": lists, "speed": self.speed})
        n_rows = max((len(value) for value in layers.values()), default=0)
        names = list(rows or [f"layer_{row:02d}" for row in range(n_rows)])
        self._chart(step, "train", figures, layers, names, self.speed)
        if "expert_load" in layers:
            self._write_loads(json.dumps({"step": step, "layers": names, "tokens": layers["expert_load"].tolist()}))
        self._explain()
        if self._live is None:
            eta = [] if self.seconds_left is None else [f"eta={duration(self.seconds_left)}"]
            shown = columns(self.figures, FIGURES) + columns(self.speed, SPEED)
            self._say("  ".join([self.heading(step), *shown, *eta]))

    def evaluation(self, step: int, scalars: Mapping[str, float]) -> None:
        """Records figures on held-out text after `step` steps."""
        if not self.enabled:
            return
        figures = {name: _number(value) for name, value in scalars.items()}
        self.held_out = {"step": step, **figures}
        self._write({"step": step, "split": "held_out", **figures})
        self._chart(step, "held_out", figures)
        if self._live is None:
            self._say("  ".join([self.heading(step), "held-out", *columns(figures, FIGURES)]))

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Adds texts to TensorBoard, as they are, beside the figures on held-out problems."""
        if self._board is None:
            return
        try:
            for number, text in enumerate(texts):
                self._board.add_text(step, "held_out", f"answers/{number}", textwrap.indent(text, "    "))
        except OSError as error:
            self._give_up(self._board, "tensorboard", error)
            self._board = None

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

    def _open(self, workdir: Path, beside: WandbRun | None) -> None:
        """Opens the log, cut back to `start_step`, and TensorBoard."""
        path = workdir / "metrics.jsonl"
        try:
            workdir.mkdir(parents=True, exist_ok=True)
            kept = [record for record in read_log(path) if 0 < self._start_step >= record["step"]]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
            self._board = Board(workdir / "tensorboard", self._start_step, beside)
            self._log = path.open("a", encoding="utf-8")
            self._loads = workdir / EXPERT_LOADS
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
            self._give_up(self._log, "metrics.jsonl", error)
            self._log = None

    def _write_loads(self, text: str) -> None:
        """Replaces the file of the loads."""
        if self._loads is None:
            return
        partial = self._loads.with_suffix(".partial")
        try:
            partial.write_text(text)
            partial.replace(self._loads)
        except OSError as error:
            self.message(f"{EXPERT_LOADS} stays as it is: {error.strerror}. Training continues.")
            self._loads = None

    def _chart(self, *figures: Any) -> None:
        """Hands the arguments of `Board.add` to TensorBoard."""
        if self._board is None:
            return
        try:
            self._board.add(*figures)
        except OSError as error:
            self._give_up(self._board, "tensorboard", error)
            self._board = None

    def _explain(self) -> None:
        """Says what the figures of a new run mean, before the first are shown."""
        if self._start_step or self._is_explained:
            return
        self._is_explained = True
        labels = {name: label for name, (label, _) in (FIGURES | SPEED).items()}
        known = [name for name in LEGEND if name in self.figures or name in self.speed]
        width = max((len(labels[name]) for name in known), default=0)
        if known:
            self.message("\n".join(f"  {labels[name]:<{width}}  {LEGEND[name]}" for name in known))

    def _give_up(self, file: Any, name: str, error: OSError) -> None:
        """Tells that a file of the run cannot be written any more, and closes it."""
        self.message(f"{name} ends at step {self.now}: {error.strerror}. Training continues.")
        with contextlib.suppress(OSError):  # what it still holds cannot be written either
            file.close()

    def heading(self, step: int) -> str:
        """How a step is called: its number of all."""
        return f"step {step:>{len(str(self.total_steps))}}/{self.total_steps}"

    def _say(self, line: str) -> None:
        with contextlib.suppress(OSError, ValueError):  # a full disk, a reader that has gone: the run matters more
            self.stream.write(line + "\n")
            self.stream.flush()


def _number(value: Any) -> int | float:
    return int(value) if isinstance(value, (bool, int, np.integer)) else float(value)


def _finite(value: Any) -> Any:
    """Replaces nan and inf, which JSON does not have, by their names; `float` reads them back."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value

"""What TensorBoard shows of a run: one chart per figure, loss first, training and held-out text in one chart.

    tensorboard/train/       loss/bits_per_byte  loss/mtp  loss/next_token  loss/total
                             optimizer/...  routing/...  speed/...
                             reward/...  answers/...  policy/...      of reinforcement learning
    tensorboard/held_out/    loss/bits_per_byte; reward/...  answers/... and answers as text

TensorBoard lays the two folders over each other wherever they share a tag, and sorts groups and charts by name.

The events are written by the caller's own thread.  tensorboardX's `SummaryWriter` has a thread for it, which a full
disk kills; then its queue fills and the next figure waits for ever. The price is an fsync every ten seconds.
"""

import contextlib
import math
import socket
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax.train.wandb_run import WandbRun

FLUSH_S = 10.0  # between the moments at which events reach the disk

# Figure -> tag; any other figure is an auxiliary loss, or a reward if there are rewards.
TAGS = {
    "bits_per_byte": "loss/bits_per_byte",
    "main": "loss/next_token",
    "mtp": "loss/mtp",
    "loss": "loss/total",  # what is minimised: all of these with their weights
    "gradient_norm": "optimizer/gradient_norm",
    "learning_rate": "optimizer/learning_rate",
    "skipped": "optimizer/skipped_steps",
    "max_violation": "routing/max_violation",
}
# Of reinforcement learning; its other figures are parts of the reward, under their names.
RL_TAGS = {
    "reward": "reward/total",
    "accuracy_error": "reward/accuracy_error",
    "greedy_accuracy": "reward/greedy_accuracy",
    "unscored": "reward/unscored",
    "tied": "reward/tied_groups",
    "answer_length": "answers/length",
    "finished_length": "answers/length_of_finished",
    "cut_off": "answers/cut_off",
    "thought": "answers/with_thought",
    "loss": "policy/loss",
    "entropy": "policy/entropy",
    "kl": "policy/kl",
    "teacher_kl": "policy/teacher_kl",
    "ratio": "policy/ratio",
    "clipped_low": "policy/clipped_low",
    "clipped_high": "policy/clipped_high",
    "off_policy": "policy/off_policy",
    "importance": "policy/importance",
    "index_kl": "policy/index_kl",
    "index_recall": "policy/index_recall",
    "gap": "policy/gap",
    "gap_mean": "policy/gap_mean",
    "rollout_s": "speed/rollout_s",
    "reward_s": "speed/reward_s",
    "update_s": "speed/update_s",
}
# These are 0 where a model has no such part, or nothing has happened: no chart of a line at 0.
ABSENT_AT_0 = ("loss/mtp", "optimizer/skipped_steps")
UNCHARTED = ("checksum", "skipped_in_row")


class Board:
    """The event files of a run in `directory`; one resumed at `start_step` hides what lies after it.

    `beside` receives the same figures.
    """

    def __init__(self, directory: Path, start_step: int, beside: WandbRun | None = None):
        self._beside = beside
        self._files = {split: _EventFile(directory / split, start_step) for split in ("train", "held_out")}

    def add(
        self,
        step: int,
        split: str,
        figures: Mapping[str, float],
        layers: Mapping[str, np.ndarray] | None = None,
        rows: Sequence[str] = (),
        speed: Mapping[str, float] | None = None,
    ) -> None:
        """Adds the figures of a step of `split`, `train` or `held_out`. Raises OSError if they cannot be written.

        `layers` is name -> array [rows] (charts) or [rows, experts] (distributions), `rows` what the rows are called,
        and `speed` the figures of the clock.
        """
        tags, group = (TAGS | RL_TAGS, "reward") if "reward" in figures else (TAGS, "auxiliary_loss")
        scalars = {tags.get(name, f"{group}/{name}"): x for name, x in figures.items() if name not in UNCHARTED}
        scalars = {tag: value for tag, value in scalars.items() if value != 0 or tag not in ABSENT_AT_0}
        scalars |= {f"speed/{name}": value for name, value in (speed or {}).items()}
        histograms: dict[str, np.ndarray] = {}
        for name, values in (layers or {}).items():
            into = scalars if values.ndim == 1 else histograms
            into |= {f"routing/{name}/{row}": value for row, value in zip(rows, values, strict=True)}
        if self._beside:
            self._beside.add(step, split, scalars, histograms)
        self._files[split].add(step, scalars, histograms)

    def add_text(self, step: int, split: str, tag: str, text: str) -> None:
        """Adds a text, which TensorBoard reads as Markdown. Raises OSError if it cannot be written."""
        self._files[split].add_text(step, tag, text)

    def close(self) -> None:
        """Writes what is left and closes all files, also if one of them raises an OSError; then what is beside."""
        with contextlib.ExitStack() as stack:
            if self._beside:
                stack.callback(self._beside.close)
            for file in self._files.values():
                stack.callback(file.close)


class _EventFile:
    def __init__(self, directory: Path, start_step: int):
        from tensorboardX.proto.event_pb2 import Event, SessionLog
        from tensorboardX.record_writer import RecordWriter

        directory.mkdir(parents=True, exist_ok=True)
        name = f"events.out.tfevents.{int(time.time()):010d}.{socket.gethostname()}"
        self._file, self._event, self._flushed_s = RecordWriter(str(directory / name)), Event, -math.inf
        self._write(0, file_version="brain.Event:2")
        if start_step:
            self._write(start_step + 1, session_log=SessionLog(status=SessionLog.START))

    def add(self, step: int, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Adds figures and distributions; those that are not finite TensorBoard cannot draw. May raise OSError."""
        from tensorboardX import summary

        for tag, value in scalars.items():
            if math.isfinite(value):
                self._write(step, summary=summary.scalar(tag, value))
        for tag, row in histograms.items():
            if np.isfinite(row).all():
                self._write(step, summary=summary.histogram(tag, row, bins=min(len(row), 32)))
        if time.monotonic() >= self._flushed_s + FLUSH_S:
            self._file.flush()
            self._flushed_s = time.monotonic()

    def add_text(self, step: int, tag: str, text: str) -> None:
        """Adds a text. May raise OSError."""
        from tensorboardX import summary

        self._write(step, summary=summary.text(tag, text))

    def close(self) -> None:
        try:
            self._file.flush()
        finally:
            self._file.close()

    def _write(self, step: int, **content: Any) -> None:
        self._file.write(self._event(wall_time=time.time(), step=step, **content).SerializeToString())

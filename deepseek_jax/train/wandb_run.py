"""The charts of a run in Weights & Biases as well (extra: wandb), under the tags of `board`; process 0 alone sends.

Its id is drawn once and kept in the workdir, so that a run that resumes continues its charts. Everything else is up to
wandb's own variables: WANDB_MODE=offline, WANDB_ENTITY, WANDB_NAME. An error of wandb ends the charts there and never
the run.
"""

import math
import secrets
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import streams
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_once

FILE = "wandb_id.txt"  # in a workdir
FINISH_S = 60.0  # at most, for what is left to send at the end


class WandbRun:
    """The run of a workdir in a project of Weights & Biases.

    `keys` are shown as its config. Raises UserError if wandb is not installed.
    """

    def __init__(self, workdir: Path, project: str, keys: dict):
        try:
            import wandb
        except ImportError as error:
            raise UserError(
                "config.wandb.project is set, and wandb is not installed. Leave it empty, or run "
                'pip install "deepseek_jax[wandb]".'
            ) from error
        self._histogram: Callable[..., Any] = wandb.Histogram
        self._run: Any = None
        self._is_over = False
        self._try(lambda: self._begin(wandb, workdir, project, keys))

    def _begin(self, wandb: Any, workdir: Path, project: str, keys: dict) -> None:
        name = identity(workdir)
        self._run = wandb.init(project=project, dir=str(workdir), id=name, resume="allow", config=keys)
        self._run.define_metric("*", step_metric="step")  # a resumed run may log earlier steps again

    def add(self, step: int, split: str, scalars: Mapping[str, float], histograms: Mapping[str, np.ndarray]) -> None:
        """Adds figures and distributions of `split`, `train` or `held_out`."""
        found: dict[str, Any] = {tag: value for tag, value in scalars.items() if math.isfinite(value)}
        for tag, row in histograms.items():
            if np.isfinite(row).all():
                edges = np.arange(len(row) + 1)  # a bar per expert
                found[tag] = self._histogram(np_histogram=(row, edges))
        named = {f"{split}/{tag}": value for tag, value in found.items()}
        self._try(lambda: self._run.log(named | {"step": step}))

    def close(self) -> None:
        """Sends what is left, for a minute at most."""
        thread = threading.Thread(target=self._try, args=(lambda: self._run.finish(),), daemon=True)
        thread.start()
        thread.join(FINISH_S)
        if thread.is_alive():
            streams.note(f"wandb: it has not sent all within {FINISH_S:.0f} s; the last charts may be missing there.")

    def _try(self, call: Callable[[], None]) -> None:
        """Makes a call unless an earlier one has failed."""
        if self._is_over:
            return
        try:
            call()
        except Exception as error:
            self._is_over = True
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            streams.note(f"wandb: {reason}. Its charts end here; training continues.")


def identity(workdir: Path) -> str:
    """Returns the id of a workdir's run, drawn when it is first asked for. Raises OSError if it cannot be kept."""
    path = workdir / FILE
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_once(path, secrets.token_hex(8).encode())
    return path.read_text(encoding="utf-8").strip()

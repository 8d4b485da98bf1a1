"""The charts of a run in Weights & Biases as well (extra: wandb), under the tags of `board`; process 0 alone sends.

Its id comes from the workdir, so that a run that resumes continues its charts. Everything else is up to wandb's own
variables: WANDB_MODE=offline, WANDB_ENTITY, WANDB_NAME. An error of wandb ends the charts there and never the run.
"""

import hashlib
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from deepseek_jax import streams
from deepseek_jax.errors import UserError


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
        name = hashlib.sha256(str(workdir.resolve()).encode()).hexdigest()[:16]
        self._try(lambda: self._begin(wandb, workdir, project, keys, name))

    def _begin(self, wandb: Any, workdir: Path, project: str, keys: dict, name: str) -> None:
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
        """Sends what is left."""
        self._try(lambda: self._run.finish())

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

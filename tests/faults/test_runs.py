"""Real runs of the train verb whose output breaks while a signal stops them."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_jax.train.checkpoint import manifest
from deepseek_jax.train.metrics import read_log

pytestmark = pytest.mark.slow

CONFIG = str(Path(__file__).parent.parent / "train" / "nano_v3.py")
SAVED_WITHIN_S = 60  # after a signal


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    """A folder of forty small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    for number in range(40):
        words = random.Random(number).choices("def return self import for in if not None True".split(), k=160)
        (folder / f"{number}.txt").write_text(" ".join(words))
    return folder


def words(workdir: Path, corpus: Path, *overrides: str) -> list[str]:
    """The command line of a run that would take for ever."""
    found = [sys.executable, "-m", "deepseek_jax", "train", f"--config={CONFIG}", f"--workdir={workdir}", "--no-sample"]
    found += [f"--config.data.source={corpus}/*.txt", f"--config.data.cache_dir={corpus.parent}/cache"]
    found += ["--config.model.n_layers=1", "--config.model.n_dense_layers=0", "--config.model.mtp_depth=0"]
    return [*found, "--config.loop.steps=1000000", "--config.loop.eval_every=0", *overrides]


def environment() -> dict[str, str]:
    """Of a process with one device, outside any cluster."""
    clusters = ("JAX_PROCESS", "JAX_NUM", "JAX_COORD", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
    return kept | {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"}


def wait_for_steps(workdir: Path, n_lines: int, processes: list[subprocess.Popen]) -> None:
    """Returns when the run has logged so many steps; fails when it has ended before."""
    while len(read_log(workdir / "metrics.jsonl")) < n_lines:
        assert all(process.poll() is None for process in processes), "the run ended before it was stopped"
        time.sleep(0.05)


def saved_steps(workdir: Path) -> list[int]:
    """The committed steps, each compared with its manifest."""
    steps = manifest.committed_steps(workdir / "checkpoints")
    for step in steps:
        manifest.verify(manifest.step_dir(workdir / "checkpoints", step), step)
    return steps


@pytest.mark.parametrize(
    ("how", "number", "code"),
    [("{} 2>&1 | tee {}", signal.SIGINT, 130), ("{} >&- 2>&- <&- # {}", signal.SIGHUP, 0)],
    ids=["ctrl-c-under-tee", "hang-up-without-streams"],
)
def test_a_run_is_saved_whatever_becomes_of_its_output(tmp_path, corpus, how, number, code):
    """The signal goes to the whole group, as a terminal sends it: tee is gone before the run has said a word."""
    workdir = tmp_path / "run"
    command = how.format(" ".join(f"'{word}'" for word in words(workdir, corpus)), tmp_path / "out")
    script = f"trap : INT HUP; {command}\nexit ${{PIPESTATUS[0]}}"
    process = subprocess.Popen(["bash", "-c", script], env=environment(), start_new_session=True)
    try:
        wait_for_steps(workdir, 4, [process])
        os.killpg(process.pid, number)
        assert process.wait(timeout=SAVED_WITHIN_S) == code
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert saved_steps(workdir)[-1] == read_log(workdir / "metrics.jsonl")[-1]["step"]

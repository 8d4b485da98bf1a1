"""Real runs of the train verb whose output breaks, that are stopped by a signal, or lose a process."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deepseek_jax.parallel.peers import LOST
from deepseek_jax.train import manifest
from deepseek_jax.train.metrics import read_log

pytestmark = pytest.mark.slow

CONFIG = str(Path(__file__).parent.parent / "train" / "nano_v3.py")
SAVED_WITHIN_S = 60  # after a signal
NOTICED_WITHIN_S = 60  # after a process is gone


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
    return [*found, "--config.train.steps=1000000", "--config.train.eval_every=0", *overrides]


def environment(n_devices: int, **more: str) -> dict[str, str]:
    clusters = ("JAX_PROCESS", "JAX_NUM", "JAX_COORD", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(clusters)}
    flags = f"--xla_force_host_platform_device_count={n_devices} --xla_backend_optimization_level=0"
    return kept | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags} | more


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
    process = subprocess.Popen(["bash", "-c", script], env=environment(1), start_new_session=True)
    try:
        wait_for_steps(workdir, 4, [process])
        os.killpg(process.pid, number)
        assert process.wait(timeout=SAVED_WITHIN_S) == code
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert saved_steps(workdir)[-1] == read_log(workdir / "metrics.jsonl")[-1]["step"]


def start_two(workdir: Path, corpus: Path) -> list[subprocess.Popen]:
    """Two processes of two devices each, joined over the loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    mesh = ("--config.mesh.data=2", "--config.mesh.expert=2", "--config.checkpoint.every=20")
    processes = []
    for index in range(2):
        own = environment(2, JAX_COORDINATOR_ADDRESS=address, JAX_NUM_PROCESSES="2", JAX_PROCESS_ID=str(index))
        with open(workdir.with_suffix(f".{index}.out"), "a") as file:
            command = words(workdir, corpus, *mesh)
            processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
    return processes


def test_a_signal_to_one_of_two_saves_on_both_and_the_loss_of_one_is_said(tmp_path, corpus):
    """SIGTERM to the second; then the same run goes on, the second is killed and the first is asked to stop as well."""
    workdir = tmp_path / "two"
    processes = start_two(workdir, corpus)
    try:
        wait_for_steps(workdir, 5, processes)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=SAVED_WITHIN_S) for process in processes] == [0, 0]
        stopped_at = read_log(workdir / "metrics.jsonl")[-1]["step"]
        assert saved_steps(workdir)[-1] == stopped_at

        processes = start_two(workdir, corpus)
        wait_for_steps(workdir, len(read_log(workdir / "metrics.jsonl")) + 3, processes)
        processes[1].kill()
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(timeout=NOTICED_WITHIN_S) == LOST
    finally:
        for process in processes:
            process.kill()
    said = workdir.with_suffix(".0.out").read_text()
    assert f"going on from step {stopped_at}" in said
    assert f"The newest checkpoint is of step {saved_steps(workdir)[-1]} in" in said.splitlines()[-1]

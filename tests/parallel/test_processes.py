"""Several processes: what joins them, and that two of them train as one does."""

import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import compat
from deepseek_jax.errors import PassingError, UserError
from deepseek_jax.launch.supervise import LONGEST_WAIT_S
from deepseek_jax.parallel.peers import GRACE_S, LOST, LOST_S
from deepseek_jax.train.checkpoint import manifest
from deepseek_jax.train.metrics import read_log

CONFIG = str(Path(__file__).parent.parent / "train" / "nano_v3.py")
SAVED_WITHIN_S = 200  # after a signal; on a busy machine, as below
NOTICED_WITHIN_S = 200  # after a process is gone
CLUSTERS = ("JAX_", "SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "KUBERNETES_", "JOB_COMPLETION_INDEX")


@pytest.fixture
def joined(monkeypatch) -> list[dict]:
    """A process outside any cluster; receives the arguments of `jax.distributed.initialize`."""
    for name in [name for name in os.environ if name.startswith(CLUSTERS)]:
        monkeypatch.delenv(name)
    calls: list[dict] = []

    def record(
        initialization_timeout: int, heartbeat_timeout_seconds: int, shutdown_timeout_seconds: int, **given: object
    ) -> None:
        assert LOST_S + 2 * GRACE_S < heartbeat_timeout_seconds <= 90  # the project's own watch comes first
        assert initialization_timeout > LONGEST_WAIT_S + LOST_S + 2 * GRACE_S  # a supervisor may wait so long
        calls.append(given)

    monkeypatch.setattr(jax.distributed, "initialize", record)
    return calls


@pytest.mark.parametrize(
    "variables",
    [
        {},
        {"JAX_NUM_PROCESSES": "1", "SLURM_NTASKS": "8"},
        {"SLURM_NTASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1"},
        {"TPU_WORKER_HOSTNAMES": "localhost"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1"},
    ],
)
def test_a_process_started_alone_stays_alone(joined, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    compat.start_processes()
    assert joined == []


@pytest.mark.parametrize(
    "variables",
    [
        {"SLURM_NTASKS": "2"},
        {"OMPI_COMM_WORLD_SIZE": "2"},
        {"TPU_WORKER_HOSTNAMES": "a,b"},
        {"TPU_PROCESS_ADDRESSES": "a:1,b:1"},
        {"MEGASCALE_NUM_SLICES": "2"},
        {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"},
    ],
)
def test_jax_finds_the_others_on_a_cluster_it_knows(joined, monkeypatch, variables):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    compat.start_processes()
    assert joined == [{}]


def test_what_is_given_is_handed_on(joined, monkeypatch):
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "0")
    compat.start_processes()
    assert joined == [{"coordinator_address": "host:1234", "num_processes": 2, "process_id": 0}]


@pytest.mark.parametrize("number", ["2", "two"])
def test_too_little_given_is_the_users_error(joined, monkeypatch, number):
    def refuse(**given):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    monkeypatch.setenv("JAX_NUM_PROCESSES", number)
    with pytest.raises(UserError, match=f"JAX_NUM_PROCESSES={number}: .*Set JAX_COORDINATOR_ADDRESS=host:port") as info:
        compat.start_processes()
    assert info.value.exit_code == 2


@pytest.mark.parametrize("error", [RuntimeError("DEADLINE_EXCEEDED: no answer"), OSError("name not known")])
def test_others_that_do_not_answer_may_answer_the_next_start(joined, monkeypatch, error):
    def refuse(**given):
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", refuse)
    for name, value in (("COORDINATOR_ADDRESS", "host:1234"), ("NUM_PROCESSES", "2"), ("PROCESS_ID", "1")):
        monkeypatch.setenv(f"JAX_{name}", value)
    with pytest.raises(PassingError, match=r"JAX_PROCESS_ID=1: .*could not be reached \((DEADLINE|name)") as info:
        compat.start_processes()
    assert info.value.exit_code == LOST


def write_corpus(folder: Path) -> None:
    """Forty small documents."""
    for number in range(40):
        words = random.Random(number).choices("def return self import for in if not None True".split(), k=160)
        (folder / f"{number}.txt").write_text(" ".join(words))


TWO_BY_TWO = ("mesh.data=2", "mesh.expert=2")
SMALL = ("--config.model.mtp_depth=0", "--config.model.n_dense_layers=0")  # blocks of one kind compile in less time
PIPELINE = ("mesh.pipe=2", "mesh.data=2", "pipeline.micro_batches=4")  # each process is one rank


def start(
    workdir: Path, steps: int, n_processes: int, *overrides: str, mesh: tuple[str, ...] = TWO_BY_TWO, **variables: str
) -> list[subprocess.Popen]:
    """The train verb on four CPU devices in all, shared out over processes joined through the loopback.

    `variables` are of their environment.
    """
    words = [f"--config={CONFIG}", f"--workdir={workdir}", "--no-sample", f"--config.loop.steps={steps}"]
    words += [f"--config.data.source={workdir.parent}/*.txt", f"--config.data.cache_dir={workdir.parent}/cache"]
    words += [*(f"--config.{size}" for size in mesh), *SMALL, *overrides]
    flags = os.environ["XLA_FLAGS"] + f" --xla_force_host_platform_device_count={4 // n_processes}"
    environment = {name: value for name, value in os.environ.items() if not name.startswith(CLUSTERS[1:])}
    environment |= {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "JAX_NUM_PROCESSES": str(n_processes)} | variables
    if n_processes > 1:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            environment["JAX_COORDINATOR_ADDRESS"] = f"127.0.0.1:{free.getsockname()[1]}"
    processes = []
    for index in range(n_processes):
        with output(workdir, index).open("a") as file:
            command = [sys.executable, "-m", "deepseek_jax", "train", *words]
            own = environment | {"JAX_PROCESS_ID": str(index)}
            processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
    return processes


def finish(workdir: Path, processes: list[subprocess.Popen]) -> list[int]:
    """The exit codes; nobody is left running."""
    try:
        return [process.wait(timeout=240) for process in processes]
    except subprocess.TimeoutExpired:
        pytest.fail("\n".join(output(workdir, index).read_text() for index in range(len(processes))))
    finally:
        for process in processes:
            process.kill()


def output(workdir: Path, index: int) -> Path:
    """Where process `index` prints."""
    return workdir.with_suffix(f".{index}.out")


def printed(workdir: Path, index: int) -> str:
    return output(workdir, index).read_text()


def figures(workdir: Path, name: str) -> list:
    return [record[name] for record in read_log(workdir / "metrics.jsonl") if name in record]


def wait_for_steps(workdir: Path, n_steps: int, processes: list[subprocess.Popen]) -> None:
    """Returns when the run has logged so many steps; fails when it has ended before."""
    while len(figures(workdir, "loss")) < n_steps:
        assert all(process.poll() is None for process in processes), printed(workdir, 0)
        time.sleep(0.05)


def committed(workdir: Path) -> int:
    """The newest step that its manifest proves whole."""
    checkpoints = workdir / "checkpoints"
    step = manifest.committed_steps(checkpoints)[-1]
    manifest.verify(manifest.step_dir(checkpoints, step), step)
    return step


@pytest.mark.slow
@pytest.mark.timeout(1800)  # it ends by itself: each wait has its limit
@pytest.mark.parametrize(
    "then",
    [
        pytest.param(TWO_BY_TWO, id="on the same mesh"),  # whose programs are in the cache
        pytest.param(PIPELINE, id="as a pipeline", marks=pytest.mark.matrix),
    ],
)
def test_two_processes_train_as_one_does_through_a_signal_and_a_loss(tmp_path, then):
    """SIGTERM to the second saves on both; resumed, the second is killed and the first ends by itself.

    The first, which no signal has reached, ends with a code that starts it again. The losses of all of it, on 2 x 2
    devices, are those of one process with 4 devices to 1e-5.
    """
    write_corpus(tmp_path)
    two, one = tmp_path / "two", tmp_path / "one"
    endless = ("--config.loop.eval_every=4", "--config.checkpoint.every=20")
    processes = start(two, 1_000_000, 2, *endless)
    try:
        wait_for_steps(two, 5, processes)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(timeout=SAVED_WITHIN_S) for process in processes] == [LOST, 0]
        stopped_at = len(figures(two, "loss"))
        assert committed(two) == stopped_at

        processes = start(two, 1_000_000, 2, *endless, mesh=then)
        wait_for_steps(two, stopped_at + 3, processes)
        processes[1].kill()
        processes[0].send_signal(signal.SIGTERM)
        assert processes[0].wait(timeout=NOTICED_WITHIN_S) == LOST
    finally:
        for process in processes:
            process.kill()
    assert f"resuming from step {stopped_at}" in printed(two, 0)
    assert f"The newest checkpoint is of step {committed(two)} in" in "".join(printed(two, 0).splitlines()[-2:])
    assert "nano_v3" not in printed(two, 1) and "loss" not in printed(two, 1)  # the first speaks for all

    n_steps = len(figures(two, "loss"))
    assert finish(one, start(one, n_steps, 1, "--config.loop.eval_every=4")) == [0], printed(one, 0)
    np.testing.assert_allclose(figures(two, "loss"), figures(one, "loss"), rtol=1e-5)
    n_evaluations = len(figures(two, "bits_per_byte"))
    np.testing.assert_allclose(figures(two, "bits_per_byte"), figures(one, "bits_per_byte")[:n_evaluations], rtol=1e-5)
    assert n_evaluations and figures(two, "checksum") == figures(one, "checksum")


@pytest.mark.slow
def test_a_directory_that_is_taken_stops_all_processes(tmp_path):
    """Only the first process sees the lock; the others must not wait for it in vain."""
    from deepseek_jax.train.checkpoint.checkpointer import Checkpointer

    write_corpus(tmp_path)
    with Checkpointer(tmp_path / "run" / "checkpoints"):
        codes = finish(tmp_path / "run", start(tmp_path / "run", 3, 2))
    assert codes == [2, 2]
    assert "being written by another run" in printed(tmp_path / "run", 0)
    assert "process 0" in printed(tmp_path / "run", 1)


# Of the runs below; DEEPSEEK_JAX_HEARTBEAT=30 is what a run has unless it says otherwise.
HEARTBEAT_S, STEP_S, STOP_S = int(os.environ.get("DEEPSEEK_JAX_HEARTBEAT", "10")), 40, 20


def sleeps_on_request(folder: Path) -> dict[str, str]:
    """Variables with which SIGUSR1 makes the main thread of a Python program sleep, while its other threads run."""
    (folder / "sitecustomize.py").write_text(
        "import signal, time\nsignal.signal(signal.SIGUSR1, lambda *_: time.sleep(3600))\n"
    )
    return {"PYTHONPATH": str(folder)}


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize(
    ("how", "victim", "also", "within_s"),
    [
        (signal.SIGKILL, 1, None, HEARTBEAT_S + 5),
        (signal.SIGKILL, 0, None, HEARTBEAT_S + 5),
        (signal.SIGSTOP, 1, None, HEARTBEAT_S + 5),
        (signal.SIGSTOP, 0, None, HEARTBEAT_S + 5),
        (signal.SIGUSR1, 1, None, STEP_S + 10),
        (signal.SIGUSR1, 0, None, STEP_S + 10),
        (signal.SIGUSR1, 1, signal.SIGTERM, STOP_S + 10),
    ],
    ids=["killed", "first-killed", "stopped", "first-stopped", "stuck", "first-stuck", "stuck-then-terminated"],
)
def test_all_processes_end_soon_after_one_is_gone_or_stuck(tmp_path, how, victim, also, within_s):
    """A process that is killed or stopped; one that is alive and does nothing, also when a signal asks all to stop."""
    write_corpus(tmp_path)
    workdir = tmp_path / "run"
    step_s = 1000 if also else STEP_S
    limits = {"heartbeat_s": HEARTBEAT_S, "step_s": step_s, "stop_s": STOP_S}
    words = [f"--config.watch.{name}={value}" for name, value in limits.items()]
    words += ["--config.loop.eval_every=0", "--config.checkpoint.every=100000"]
    processes = start(workdir, 1_000_000, 2, *words, **sleeps_on_request(tmp_path))
    try:
        wait_for_steps(workdir, 5, processes)
        begin_s = time.monotonic()
        processes[victim].send_signal(how)
        for process in processes if also else ():
            process.send_signal(also)
        expected = processes if how == signal.SIGUSR1 else [processes[1 - victim]]
        codes = [process.wait(timeout=within_s + 60) for process in expected]
        took_s = time.monotonic() - begin_s
    finally:
        for process in processes:
            process.kill()
            process.wait()
    print(f"{how.name} to process {victim}: codes {codes} after {took_s:.1f} s")
    ended_by_jax = {-signal.SIGABRT} if victim == 0 else set()
    assert set(codes) <= {LOST} | ended_by_jax and LOST in codes + [LOST] * bool(ended_by_jax)
    assert took_s < within_s
    if how == signal.SIGUSR1:
        stacks = [(workdir / "hosts" / f"process_{index}.stacks").read_text() for index in (0, 1)]
        assert "sleep" in stacks[victim] or "sitecustomize" in stacks[victim]
        assert "_training.py" in stacks[1 - victim]

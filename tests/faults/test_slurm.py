"""A SLURM of two nodes on this machine: a rank is killed and the job ends as if it had not been; scancel saves.

Needs Debian's packages slurmctld, slurmd, slurm-client and munge, and root; skipped elsewhere. Nothing outside the
test's folder is written, and no service of the machine is used.
"""

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from deepseek_jax.train.checkpoint import manifest
from deepseek_jax.train.metrics import read_log

PROGRAMS = ("slurmctld", "slurmd", "munged", "srun", "sbatch", "scancel", "squeue")
PATH = f"{os.environ['PATH']}:/usr/sbin"
IS_HERE = os.geteuid() == 0 and all(shutil.which(name, path=PATH) for name in PROGRAMS)
pytestmark = [
    pytest.mark.matrix,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not IS_HERE, reason="needs SLURM, munge and root"),
]
CONFIG = str(Path(__file__).parent.parent / "train" / "nano_v3.py")
STEPS, EVERY = 30, 10
KILL_WAIT_S = 60  # of this SLURM, between SIGTERM and SIGKILL


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def settings(folder: Path) -> str:
    """The cluster: its controller and two nodes, all of them this machine."""
    host = socket.gethostname().partition(".")[0]
    nodes = [
        f"NodeName=n{number} NodeHostname={host} NodeAddr=127.0.0.1 Port={free_port()} CPUs=2 State=UNKNOWN"
        for number in (1, 2)
    ]
    return "\n".join(
        [
            *("ClusterName=test", f"SlurmctldHost={host}(127.0.0.1)", f"SlurmctldPort={free_port()}"),
            *("SlurmUser=root", "AuthType=auth/munge", f"AuthInfo=socket={folder}/munge.socket"),
            *(f"StateSaveLocation={folder}/state", f"SlurmdSpoolDir={folder}/spool.%n"),
            *(f"SlurmctldPidFile={folder}/ctld.pid", f"SlurmdPidFile={folder}/%n.pid"),
            *("ProctrackType=proctrack/linuxproc", "TaskPlugin=task/none", "SelectType=select/cons_tres"),
            *("SelectTypeParameters=CR_Core", "ReturnToService=2", "MpiDefault=none", f"KillWait={KILL_WAIT_S}"),
            *("SlurmdParameters=config_overrides", "SlurmdTimeout=600", *nodes),
            "PartitionName=all Nodes=n1,n2 Default=YES State=UP OverSubscribe=FORCE MaxTime=INFINITE",
        ]
    )


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Path]:
    """A running SLURM, in a folder with a corpus."""
    folder = tmp_path_factory.mktemp("slurm")
    folder.chmod(0o755)
    for number in range(40):
        words = random.Random(number).choices("def return self import for in if not None True".split(), k=160)
        (folder / f"{number}.txt").write_text(" ".join(words))
    (folder / "munge.key").write_bytes(random.Random(0).randbytes(1024))
    (folder / "munge.key").chmod(0o600)
    (folder / "slurm.conf").write_text(settings(folder) + "\n")
    files = [f"--{what}={folder}/munge.{end}" for what, end in (("key-file", "key"), ("socket", "socket"))]
    files += [f"--pid-file={folder}/munge.pid", f"--log-file={folder}/munge.log", f"--seed-file={folder}/munge.seed"]
    commands = [["munged", "--foreground", "--force", *files], ["slurmctld", "-D", "-c"]]
    commands += [["slurmd", "-D", "-N", node] for node in ("n1", "n2")]
    environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf", "PATH": PATH}
    processes = []
    try:
        for command in commands:
            with (folder / f"{len(processes)}.{command[0]}.out").open("w") as log:
                started = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
            processes.append(started)
            time.sleep(1)
        wait_for(lambda: slurm(folder, "sinfo", "-h", "-t", "idle", "-o", "%D").strip() == "2", processes, 60)
        yield folder
    finally:
        for process in reversed(processes):
            process.terminate()
        for process in processes:
            process.wait(timeout=30)


def slurm(folder: Path, *words: str) -> str:
    """What a command of the cluster prints."""
    environment = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
    return subprocess.run(words, env=environment, capture_output=True, text=True, cwd=folder).stdout


def wait_for(condition, processes=(), seconds: float = 1500) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it took too long"
        assert all(process.poll() is None for process in processes)
        time.sleep(0.1)


def submit(folder: Path, name: str, steps: int) -> tuple[str, Path]:
    """Puts a run of two supervised tasks into the queue; returns its number and its workdir."""
    workdir = folder / name
    python = f"{sys.executable} -m deepseek_jax"
    words = [f"--config={CONFIG}", f"--workdir={workdir}", "--no-sample", f"--config.loop.steps={steps}"]
    words += [f"'--config.data.source={folder}/*.txt'", f"--config.data.cache_dir={folder}/cache"]
    words += ["--config.mesh.data=2", "--config.mesh.expert=2", "--config.model.mtp_depth=0"]
    words += ["--config.loop.eval_every=0", f"--config.checkpoint.every={EVERY}", "--config.loop.log_every=1"]
    words += ["--config.watch.long_s=150"]  # what hangs in the beginning is started again within the test's time
    flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2"
    script = folder / f"{name}.sbatch"
    script.write_text(
        f"#!/bin/bash\n#SBATCH --nodes=2 --ntasks-per-node=1 --output={folder}/{name}.log\n"
        f"export JAX_PLATFORMS=cpu XLA_FLAGS='{flags}' JAX_COORDINATOR_ADDRESS=127.0.0.1:{free_port()}\n"
        f"exec srun --kill-on-bad-exit=0 --wait=0 --label {python} supervise --wait=12 -- {python} train "
        + " ".join(words)
        + "\n"
    )
    number = slurm(folder, "sbatch", "--parsable", str(script)).strip()
    assert number.isdigit()
    return number, workdir


def is_over(folder: Path, number: str) -> bool:
    return slurm(folder, "squeue", "-h", "-j", number).strip() == ""


def rank(workdir: Path, index: int) -> int:
    """The process of a rank that trains in a workdir."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            variables = (entry / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        is_training = words[3:4] == [b"train"] and f"--workdir={workdir}".encode() in words
        if is_training and f"SLURM_PROCID={index}".encode() in variables:
            found.append(int(entry.name))
    assert len(found) == 1
    return found[0]


def losses(workdir: Path) -> list[float]:
    return [record["loss"] for record in read_log(workdir / "metrics.jsonl") if "loss" in record]


def committed(workdir: Path) -> list[int]:
    return manifest.committed_steps(workdir / "checkpoints")


def test_a_rank_killed_after_a_commit_changes_no_bit_of_the_losses(cluster):
    """Both supervisors start their ranks again; the run ends as one that nobody disturbed."""
    number, workdir = submit(cluster, "killed", STEPS)
    wait_for(lambda: committed(workdir))
    begin_s = time.monotonic()
    at, victim = committed(workdir)[-1], rank(workdir, 1)
    os.kill(victim, signal.SIGKILL)
    wait_for(lambda: is_over(cluster, number))
    took_s = time.monotonic() - begin_s
    said = (cluster / "killed.log").read_text()
    assert said.count("Starts again in 12 s") >= 2, said
    resumed = [int(step) for step in re.findall(r"resuming from step (\d+)", said)]
    assert resumed and min(resumed) >= at, said
    number, whole = submit(cluster, "whole", STEPS)
    wait_for(lambda: is_over(cluster, number))
    assert losses(workdir) == losses(whole) and len(losses(whole)) == STEPS
    assert committed(workdir)[-1] == committed(whole)[-1] == STEPS
    print(f"killed after the COMMIT of step {at}; ended {took_s:.0f} s later, {STEPS} losses equal bit for bit")


def test_scancel_saves_within_its_grace(cluster):
    """SIGTERM to all processes of the job; SIGKILL would follow after KillWait."""
    number, workdir = submit(cluster, "cancelled", 1_000_000)
    wait_for(lambda: len(losses(workdir)) > 12)
    begin_s = time.monotonic()
    slurm(cluster, "scancel", number)
    wait_for(lambda: is_over(cluster, number))
    took_s = time.monotonic() - begin_s
    said = (cluster / "cancelled.log").read_text()
    assert "SIGTERM: saves this step and ends" in said and "Starts again" not in said, said
    assert committed(workdir)[-1] == len(losses(workdir))
    print(f"scancel: saved step {committed(workdir)[-1]} and ended in {took_s:.1f} s of {KILL_WAIT_S}")

"""Whole runs of the train verb: killed, stopped, moved to another mesh, gone wrong."""

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import cli, run
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options, export, train
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.saved_config import to_json
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.metrics import read_log
from tests.forks import end_all, fork, one_device

CONFIG = str(Path(__file__).with_name("nano_v3.py"))
EXPERTS = ("--config.model.mtp_depth=0", "--config.model.n_dense_layers=0")  # one kind of block compiles faster
SMALL = (*EXPERTS, "--config.loop.eval_every=0")
KILLS = 2 * int(os.environ.get("DEEPSEEK_JAX_FAULTS", "1"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> str:
    """A glob of forty small documents."""
    folder = tmp_path_factory.mktemp("corpus")
    words = "def return self import for in if not None True yield class lambda".split()
    for number in range(40):
        choose = random.Random(number)
        lines = (" ".join(choose.choices(words, k=8)) for _ in range(20))
        (folder / f"{number}.txt").write_text("\n".join(lines))
    return f"{folder}/*.txt"


@pytest.fixture(autouse=True)
def nothing_left_running():
    """However a test ends, the processes that it started do as well."""
    yield
    end_all()


def trained(workdir: Path, corpus: str, *overrides: str) -> int:
    """The train verb in this process."""
    return train.main(verb(workdir, corpus, *overrides)[1:])


def verb(workdir: Path, corpus: str, *overrides: str) -> list[str]:
    """The train verb and its options."""
    words = ["train", f"--config={CONFIG}", f"--workdir={workdir}", "--no-sample", f"--config.data.source={corpus}"]
    return [*words, f"--config.data.cache_dir={workdir.parent}/cache", *overrides]


def start(workdir: Path, corpus: str, *overrides: str) -> multiprocessing.Process:
    """The train verb in a process of its own, on one device."""
    return fork(output(workdir), one_device(), run_verb, verb(workdir, corpus, *overrides))


def run_verb(words: list[str]) -> None:
    """What a fork runs."""
    sys.exit(cli.main(words))


def output(workdir: Path) -> Path:
    """Where a started process prints."""
    return workdir.with_suffix(".out")


def curve(workdir: Path) -> list[dict]:
    """The log of a run without what the clock decides."""
    return [{key: value for key, value in record.items() if key != "speed"} for record in read_log_of(workdir)]


def read_log_of(workdir: Path) -> list[dict]:
    return read_log(workdir / "metrics.jsonl")


def losses(workdir: Path) -> np.ndarray:
    return np.array([record["loss"] for record in read_log_of(workdir) if record["split"] == "train"])


def checksums(workdir: Path) -> list[int]:
    return [record["checksum"] for record in read_log_of(workdir) if record["split"] == "train"]


@pytest.mark.slow
def test_killed_again_and_again_the_log_is_the_same_bit_for_bit(tmp_path, corpus, monkeypatch):
    """SIGKILL at random moments, start-up and saving included; then the log equals that of an undisturbed run."""
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where a fork finds this file
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    words = (f"--config.loop.steps={12 * KILLS}", *EXPERTS)
    process = start(whole, corpus, *words)
    process.join(timeout=300)
    assert process.exitcode == 0, output(whole).read_text()

    choose = random.Random(os.environ.get("KILL_SEED", "0"))
    for _ in range(KILLS):
        begun = len(read_log_of(killed))
        process = start(killed, corpus, *words)
        wait_for_lines(process.is_alive, killed, begun + choose.randint(0, 5))
        time.sleep(choose.uniform(0.0, 0.05))
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL, output(killed).read_text()  # it was running until then
    assert 0 < read_log_of(killed)[-1]["step"] < 12 * KILLS
    process = start(killed, corpus, *words)
    process.join(timeout=300)
    assert process.exitcode == 0, output(killed).read_text()
    assert curve(killed) == curve(whole)
    assert len(losses(whole)) == 12 * KILLS


def wait_for_lines(runs: Callable[[], bool], workdir: Path, n_lines: int) -> None:
    """Returns when the run has logged this many lines, or has ended."""
    while runs() and len(read_log_of(workdir)) < n_lines:
        time.sleep(0.02)


@pytest.mark.slow
def test_sigterm_saves_and_exits_with_0(tmp_path, corpus, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[2])  # where a fork finds this file
    workdir = tmp_path / "run"
    process = start(workdir, corpus, *SMALL, "--config.loop.steps=100000", "--config.checkpoint.every=100000")
    wait_for_lines(process.is_alive, workdir, 4)
    process.terminate()
    process.join(timeout=120)
    assert process.exitcode == 0, output(workdir).read_text()
    printed = output(workdir).read_text()
    saved = int(printed.split("checkpoint of step ")[1].split(":")[0])
    assert saved == read_log_of(workdir)[-1]["step"]
    assert "stopped on request; resume with: deepseek-jax train" in printed


@pytest.mark.slow
@pytest.mark.parametrize(
    "axes",
    [
        pytest.param(("data", "expert"), id="four"),
        pytest.param(("data", "context", "expert"), id="eight", marks=pytest.mark.matrix),
    ],
)
def test_a_run_moves_to_several_devices_and_back(tmp_path, corpus, axes):
    """Saved on one device, resumed on two per axis, and back: the losses of an unmoved run to 1e-5.

    Held-out text is judged with redundant experts there. States move along the axis context in `test_context_steps.py`.
    """
    one = ("--config.mesh.data=1", "--config.loop.eval_every=3", "--config.loop.eval_redundant=0")
    several = [*(f"--config.mesh.{axis}=2" for axis in axes), "--config.loop.eval_redundant=2"]
    trained(tmp_path / "still", corpus, *SMALL, "--config.loop.steps=9", *one)
    moving = tmp_path / "moving"
    for steps, mesh in ((3, one), (6, several), (9, one)):
        trained(moving, corpus, *SMALL, f"--config.loop.steps={steps}", *mesh)
    np.testing.assert_allclose(losses(moving), losses(tmp_path / "still"), rtol=1e-5)
    assert checksums(moving) == checksums(tmp_path / "still")
    judged, known = (
        [record for record in read_log_of(workdir) if record["split"] == "held_out"]
        for workdir in (moving, tmp_path / "still")
    )
    np.testing.assert_allclose([record["main"] for record in judged], [record["main"] for record in known], rtol=1e-5)
    with_replicas = [record for record in judged if "imbalance_redundant" in record]
    assert [record["step"] for record in with_replicas] == [6]
    assert all(record["imbalance_redundant"] <= record["imbalance"] for record in with_replicas)


@pytest.mark.slow
def test_the_average_of_a_run_is_resumed_judged_and_exported(tmp_path, corpus):
    """In one go or in two: the same held-out losses, which are the average's, and the same weights exported."""
    words = (
        *EXPERTS,
        "--config.mesh.data=1",
        "--config.loop.eval_every=2",
        "--config.loop.eval_batches=1",
        "--config.checkpoint.every=2",
    )
    parts = {"whole": (4,), "parted": (2, 4), "plain": (4,)}
    for name, ends in parts.items():
        own = () if name == "plain" else ("--config.ema.decay=0.5", "--config.ema.evaluate=True")
        for end in ends:
            assert trained(tmp_path / name, corpus, *words, *own, f"--config.loop.steps={end}") == 0
    logs = {name: read_log_of(tmp_path / name) for name in parts}
    judged = {name: [row for row in log if row["split"] == "held_out"] for name, log in logs.items()}
    assert [row["step"] for row in judged["whole"]] == [0, 2, 4]
    assert judged["whole"] == judged["parted"] != judged["plain"]
    for name, *ema in (("whole", "--ema"), ("parted", "--ema"), ("whole",), ("plain",)):
        to = tmp_path / f"{name}{len(ema)}"
        assert export.main([f"--workdir={tmp_path / name}", f"--to={to}", *ema]) == 0
    weights = {path.parent.name: path.read_bytes() for path in tmp_path.glob("*/model*.safetensors")}
    assert weights["whole1"] == weights["parted1"] != weights["whole0"] == weights["plain0"]


@pytest.mark.slow
def test_resuming_changes_no_dtype_value_or_placement(tmp_path):
    """On data 2 x expert 4, with float32 weights and bfloat16 moments: each leaf comes back where and as it was."""
    config = _options.parse([f"--config={CONFIG}", *SMALL, "--config.optimizer.moments_dtype=bfloat16"]).config
    trainer = run.trainer(config, make_mesh(2, 4))
    state = trainer.init(0)
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(1, state, {"config": {}})
        _, again, _ = checkpoints.restore(trainer.abstract)
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for before, after in zip(jax.tree.leaves(state), jax.tree.leaves(again), strict=True):
        assert after.dtype == before.dtype and after.sharding == before.sharding
        np.testing.assert_array_equal(np.asarray(after), np.asarray(before))
    dtypes = {str(leaf.dtype) for leaf in jax.tree.leaves(again["optimizer"]["mu"])}
    assert dtypes == {"bfloat16"} and any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(again))


@pytest.mark.slow
def test_steps_that_are_not_finite_stop_the_run(tmp_path, corpus, capsys):
    wild = (*SMALL, "--config.mesh.data=1", "--config.schedule.peak_rate=1000", "--config.optimizer.weight_decay=1000")
    wild += ("--config.loop.max_skipped=3", "--config.loop.steps=60")  # weights grow a million times per step
    with pytest.raises(UserError, match="3 steps in a row were not finite .* Lower config.schedule.peak_rate"):
        trained(tmp_path / "run", corpus, *wild, "--config.schedule.warmup_steps=1")
    assert "skipped: not finite" in capsys.readouterr().out


def test_a_workdir_refuses_another_network_or_text(tmp_path):
    config = _options.parse([f"--config={CONFIG}"]).config
    saved = json.loads(json.dumps({"config": to_json(config), "text": "abc"}))
    run.check_same_run(config, "abc", saved, tmp_path)
    with pytest.raises(UserError, match="on other text"):
        run.check_same_run(config, "abd", saved, tmp_path)
    other = _options.parse([f"--config={CONFIG}", "--config.model.d_model=64"]).config
    with pytest.raises(UserError, match=r"config.model.d_model: 32 -> 64.*another --workdir"):
        run.check_same_run(other, "abc", saved, tmp_path)


def test_what_changed_between_two_configs_is_named():
    config = _options.parse([f"--config={CONFIG}"]).config
    other = _options.parse([f"--config={CONFIG}", "--config.schedule.peak_rate=0.5"]).config
    assert run.differences(config, other) == ["schedule.peak_rate: 0.003 -> 0.5"]

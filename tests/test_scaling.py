"""`bench scaling`: its layouts, what it keeps when interrupted, and what it makes of times, losses and profiles."""

import json
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _overlap, _scaling, _scaling_run
from deepseek_jax.launch._bench_step import Ours
from deepseek_jax.launch._profile import Event
from deepseek_jax.launch._scaling import Split
from deepseek_jax.saved_config import to_json

CONFIG = str(Path(__file__).parent / "train" / "nano_v3.py")
SCHEDULES = ["1f1b", "dualpipe"]


@pytest.fixture(scope="module")
def config():
    return run_config.load(CONFIG)


def options(**changed) -> SimpleNamespace:
    return SimpleNamespace(**{name: flag[1] for name, flag in _scaling.EXTRA.items()} | changed)


@pytest.mark.parametrize("n_devices", [1, 2, 4, 8, 6])
def test_layouts_are_all_splits_of_the_devices_and_one(n_devices):
    one, *found = _scaling.splits(n_devices, SCHEDULES)
    assert one.name == "one" and one.devices == 1 and all(split.devices == n_devices for split in found)
    assert len({split.name for split in found}) == len(found)
    axes = {split[:3] for split in found}
    sizes = range(1, n_devices + 1)
    everything = {(p, d, e) for p in sizes for d in sizes for e in sizes if p * d * e == n_devices > 1}
    assert axes == everything
    assert all((split.pipe > 1) == bool(split.schedule) for split in found)


def test_layouts_of_four_devices_by_name():
    names = [split.name for split in _scaling.splits(4, ["1f1b"])]
    assert names == [
        *("one", "data4", "data4-fsdp", "data2-expert2", "data2-expert2-fsdp", "expert4"),
        *("pipe2-data2-1f1b", "pipe2-expert2-1f1b", "pipe4-1f1b"),
    ]
    assert [split.name for split in _scaling.chosen(_scaling.splits(4, []), "expert4,one")] == ["one", "expert4"]
    with pytest.raises(UserError, match="no layout pipe3 here. Choose from one, data4, "):
        _scaling.chosen(_scaling.splits(4, []), "one,pipe3")


def test_all_layouts_train_the_same_batches_in_micro_batches_enough_for_dualpipe(config):
    for split in _scaling.splits(8, SCHEDULES):
        made = _scaling.config_of(split, config, options(sequences=4, micro_sequences=2), 8)
        assert made.batch.size == made.batch.size_start == 32
        assert made.pipeline.micro_batches * split.data * split.expert * 2 == 32
        assert split.pipe == 1 or made.pipeline.micro_batches >= 2 * split.pipe
        assert made.sharding.embed == ("data" if split.fsdp else "")


class Process:
    """Stands for the process that measures: writes its file, or fails."""

    measured: list[str]
    fails = False
    returncode = 1

    def __init__(self, command, stdout, **_):
        job, file = json.loads(command[-3]), Path(command[-1])
        self.measured.append(Split(*job["split"]).name)
        if self.fails:
            stdout.write("RESOURCE_EXHAUSTED: out of memory\n")
        else:
            nothing_more = {"profile": {}, "peak_memory_bytes": None, "imbalance": 1.25}
            file.write_text(json.dumps({"seconds": [0.5], "losses": [4.0]} | nothing_more))

    def poll(self):
        return self.returncode

    def wait(self):
        return self.returncode

    def kill(self):
        pass


def test_what_was_measured_is_kept_and_the_rest_measured_again(config, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(_scaling.subprocess, "Popen", Process)
    monkeypatch.setattr(_scaling, "machine", lambda environment: (2, "cpu", "0"))
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    Process.measured = []

    def bench(layouts: str, *more: str) -> int:
        return _scaling.main([f"--config={CONFIG}", f"--out={tmp_path}", f"--layouts={layouts}", *more])

    assert [bench("one"), bench("one"), bench("one,expert2", "--steps=7")] == [0, 0, 0]
    assert Process.measured == ["one", "one", "expert2"]
    monkeypatch.setattr(Process, "fails", True)
    assert [bench("data2", "--steps=7"), bench("data2", "--steps=7")] == [1, 1]
    assert Process.measured[3:] == ["data2", "data2"]
    monkeypatch.setattr(Process, "fails", False)
    assert bench("data2") == 1, "with other steps than the row of one device"
    out = capsys.readouterr().out
    assert "2-one: measured before" in out and "experts of the busiest device 1.25 of the mean" in out
    assert "2-data2: ended with code 1: RESOURCE_EXHAUSTED: out of memory" in out
    one, expert, other = json.loads((tmp_path / "scaling.json").read_text())["rows"]
    assert one["of_one"] == expert["of_one"] == 1 and one["agrees"] and "of_one" not in other
    assert (tmp_path / "scaling.md").read_text().count("\n") == 5


def entry(config, split: Split, seconds: list[float], losses: list[float], profile: dict | None = None) -> dict:
    job = {"split": list(split), "config": to_json(_scaling.config_of(split, config, options(), 2))}
    found = {"losses": losses, "seconds": seconds, "compile_seconds": 1.0, "peak_memory_bytes": 2**30}
    return {"job": job, "found": found | {"profile": profile or {}, "sent_bytes": 2e8}}


def test_a_row_compares_with_one_device_and_with_the_plan(config):
    one = entry(config, Split(1, 1, 1), [0.9, 1.0, 1.1], [4.0, 2.0])
    profile = {"step": 10.0, "waiting": 1.0, "exchange": 4.0, "exchange_hidden": 3.0, "main_exchange": 0.0, "nccl": 5.0}
    profile |= {"compute": 7.0, "compute_most": 8.0}
    two = entry(config, Split(2, 1, 1, "1f1b"), [0.5], [4.0, 2.0004], profile)
    plan = _scaling.planner(one, "NVIDIA H200", "")
    assert plan is not None
    assert _scaling.planner(one, "cpu", "") is None
    alone, found = (_scaling.row(name, each, one, plan) for name, each in (("2-one", one), ("2-two", two)))
    assert alone["seconds"] == 1.0 and alone["of_one"] == 1 and alone["losses_off"] == 0 and alone["agrees"]
    assert abs(alone["planned_error"]) < 1e-3
    assert found["of_one"] == 2 and found["losses_off"] == pytest.approx(2e-4) and not found["agrees"]
    assert found["tokens_per_second"] == 2 * alone["tokens_per_second"] == 2 * 8 * 32
    cells = dict(zip(_scaling.COLUMNS, _scaling.cells(found), strict=True))
    assert (
        cells["computes"] == "70.0%, 80.0%"
        and cells["waiting"] == "10.0%"
        and cells["hidden"] == "75%, main -"
        and cells["of one"] == "2.00"
    )
    assert cells["in NCCL"] == "50.0%" and cells["exchange"] == "0.4 GB, 100 GB/s"
    assert "TOO MUCH" in cells["losses off by"]


def test_loads_of_devices_are_those_of_their_experts():
    """Two routers, the second balanced: devices with 3 + 1 and 0 + 0 rows of 4, and with 2 each."""
    loads = [np.array([[3, 1, 0, 0], [1, 1, 1, 1]])]
    assert _scaling_run.imbalance(loads, 2) == 1.5 and _scaling_run.imbalance(loads, 1) == 1
    assert _scaling_run.imbalance([], 2) == 1


def test_biases_are_moved_against_the_loads():
    """Not those of a network that has none, which is said before anything is compiled."""
    biases = {"bias_E": jnp.zeros((1, 4), jnp.float32), "experts_VK": jnp.ones((1, 9, 2), jnp.int32)}
    stored = {"router_bias": {"moe_blocks": biases}}
    trainer = SimpleNamespace(stored=stored, router_biases=lambda state: state["router_bias"], load=lambda new: new)
    report = SimpleNamespace(loads={"moe_blocks": jnp.array([[4, 2, 2, 0]])})
    ours = SimpleNamespace(trainer=trainer, state=dict(stored), report=report, levelling=0.2)
    Ours.level(ours)
    found = ours.state["router_bias"]["moe_blocks"]
    np.testing.assert_allclose(found["bias_E"], [[-0.2, 0, 0, 0.2]])
    np.testing.assert_array_equal(found["experts_VK"], biases["experts_VK"])  # a table of experts by token id
    with pytest.raises(UserError, match="--settle=8: tiny_v2 has no router biases"):
        _scaling.main(["--config=tiny_v2", "--settle=8"])


def test_shares_of_waiting_follow_from_the_schedule():
    """8 micro-batches over 4 ranks: 1F1B waits 3 of 8 + 3 units; in ticks an F lasts as long as its neighbours' BW."""
    found = _scaling.waits(Split(4, 1, 1, "1f1b"), 8, -1)
    assert found["bubble_by_formula"] == pytest.approx(3 / 11) and found["bubble_in_ticks"] > 3 / 11
    dual = _scaling.waits(Split(4, 1, 1, "dualpipe"), 8, -1)
    assert dual["bubble_by_formula"] == pytest.approx(2 / (8 * 3 + 2))
    assert _scaling.waits(Split(1, 4, 2), 8, -1) == {}


def test_what_a_profile_hides_by_hand():
    """Device a: 4 ms of exchange, of which 3 under a matmul, then 2 ms in which it waits in a transfer and 1 idle."""
    ms = 1e3
    a = [
        Event(("a", 1), "gemm", 0, 5 * ms),
        Event(("a", 2), "all_to_all.1", 2 * ms, 4 * ms),
        Event(("a", 2), "collective-permute.2", 6 * ms, 2 * ms),
        Event(("a", 2), "all-reduce.3", 9 * ms, 1 * ms),
    ]
    b = [Event(("b", 1), "gemm", 0, 10 * ms)]
    found = _overlap.summary([*a, *b], lambda name: name == "all_to_all.1")
    assert found["step"] == 10 and found["compute"] == 7.5 and found["reductions"] == 0.5
    assert found["nccl"] == 3.5 and found["compute_most"] == 10
    assert found["exchange"] == found["main_exchange"] == 2 and found["exchange_hidden"] == 1.5
    assert found["waiting"] == 1.5
    assert _overlap.summary(a, lambda name: False)["main_exchange"] == 0
    assert _overlap.summary([], lambda name: True) == {}


def test_spans():
    assert _overlap.union([(5, 6), (0, 2), (1, 3), (3, 4)]) == [(0, 4), (5, 6)]
    assert _overlap.shared([(0, 4), (5, 6)], [(3, 7)]) == 2 == _overlap.length([(0, 2)])

"""The log is exact and survives kills; lines are stable; the live view draws at any width."""

import io
import json
import math
import os
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.alltoall import Exchange, Sent
from deepseek_jax.train import board
from deepseek_jax.train import metrics as metrics_module
from deepseek_jax.train.attempts import Attempts
from deepseek_jax.train.loop import exchange_figures, router_places, rows_of
from deepseek_jax.train.metrics import EXPERT_LOADS, Metrics, bits_per_byte, read_log


def open_metrics(workdir, **options):
    options = {"total_steps": 20, "tokens_per_step": 100, "stream": io.StringIO(), "live": False} | options
    return Metrics(workdir, **options)


def run(workdir, steps, **options):
    """Logs figures that depend on the step alone."""
    with open_metrics(workdir, **options) as metrics:
        for step in steps:
            load_LE = np.array([[1.0, 2.0, 3.0], [step, step, step]])
            metrics.step(step, {"loss": 1 / step, "skipped": 0}, {"expert_load": load_LE, "router_bias": load_LE})
            if step % 5 == 0:
                metrics.evaluation(step, {"loss": math.pi / step})


def decided(workdir):
    """Returns the log without what the clock decides."""
    records = read_log(workdir / "metrics.jsonl")
    return [{key: value for key, value in record.items() if key != "speed"} for record in records]


def test_the_log_of_a_killed_and_resumed_run_is_the_uninterrupted_one(tmp_path):
    run(tmp_path / "whole", range(1, 21))
    run(tmp_path / "cut", range(1, 14))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 14, "split": "tr')  # torn by a kill
    run(tmp_path / "cut", range(11, 21), start_step=10)
    assert decided(tmp_path / "cut") == decided(tmp_path / "whole")
    assert len(decided(tmp_path / "cut")) == 24


def test_a_run_from_the_start_begins_a_new_log(tmp_path):
    run(tmp_path, [1, 2, 3])
    run(tmp_path, [1])
    assert [record["step"] for record in decided(tmp_path)] == [1]


def test_the_log_keeps_every_bit(tmp_path):
    values = {"loss": 0.1 + 0.2, "gradient_norm": float(np.float32(1 / 3)), "tiny": 5e-324, "tokens": 12345678901234567}
    with open_metrics(tmp_path) as metrics:
        metrics.step(1, values)
    (record,) = read_log(tmp_path / "metrics.jsonl")
    assert {name: record[name] for name in values} == values
    assert isinstance(record["tokens"], int)


def test_every_line_is_json_even_with_nan(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.step(1, {"loss": math.nan, "gradient_norm": math.inf})
        metrics.step(2, {"loss": 1.0}, {"expert_load": np.full((1, 2), np.nan)})

    def refuse(name):
        raise AssertionError(name)

    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    first, _ = (json.loads(line, parse_constant=refuse) for line in lines)
    assert math.isnan(float(first["loss"])) and math.isinf(float(first["gradient_norm"]))


def test_a_line_is_on_disk_before_the_next_step(tmp_path):
    metrics = open_metrics(tmp_path)
    metrics.step(1, {"loss": 1.0})
    assert len(read_log(tmp_path / "metrics.jsonl")) == 1
    metrics.close()
    metrics.close()
    metrics.step(2, {"loss": 1.0})  # after the end: nothing
    assert len(read_log(tmp_path / "metrics.jsonl")) == 1


def test_the_first_record_starts_the_clock_and_pauses_do_not_count(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(metrics_module.time, "monotonic", lambda: now[0])
    metrics = open_metrics(tmp_path, flops_per_token=1e12, device_kind="NVIDIA H200", n_devices=2)
    now[0] = 60.0  # compilation
    metrics.step(1, {"loss": 1.0})
    assert "tokens_per_second" not in metrics.speed and metrics.seconds_left is None
    with metrics.paused():
        now[0] += 1000.0
    now[0] += 8.0
    metrics.step(5, {"loss": 1.0})
    assert metrics.speed["tokens_per_second"] == pytest.approx(4 * 100 / 8)
    assert metrics.speed["mfu"] == pytest.approx(50 * 1e12 / (2 * 989e12))
    assert metrics.seconds_left == pytest.approx(15 * 2)
    now[0] += 10.0
    metrics.step(6, {"loss": 1.0}, tokens=1400)
    assert metrics.speed["tokens_per_second"] == pytest.approx((400 + 1400) / 18)
    metrics.close()
    assert metrics.stream.getvalue().splitlines()[1].endswith("eta=0:00:30")


def test_plain_lines(tmp_path):
    stream = io.StringIO()
    with open_metrics(tmp_path, total_steps=1000, stream=stream) as metrics:
        metrics.message("8 devices")
        metrics.step(1, {"gradient_norm": 2.0, "main": 5.54321, "loss": 9.9, "learning_rate": 3e-6, "other": 7.0})
        metrics.evaluation(1, {"main": 5.5, "bits_per_byte": 7.93})
    first, legend, second, third = stream.getvalue().splitlines()
    assert first == "8 devices"
    assert legend == "  loss  how badly the next token is predicted, in nats per token"
    assert second.startswith("step    1/1000  loss=5.5432  lr=3.00e-06  grad_norm=2.000")
    assert third == "step    1/1000  held-out  loss=5.5000  bits/byte=7.9300"


ALL = {"main": 2.0, "mtp": 2.5, "bits_per_byte": 3.0, "max_violation": 0.5, "skipped": 0}


def test_a_new_run_explains_its_figures_once_and_a_resumed_one_does_not(tmp_path):
    def said(figures, **options):
        with open_metrics(tmp_path, **options) as metrics:
            for step in (11, 12):
                metrics.step(step, figures)
        return [line for line in metrics.stream.getvalue().splitlines() if not line.startswith("step")]

    assert [line.split()[0] for line in said(ALL)] == ["loss", "mtp", "bits/byte", "maxvio", "skipped"]
    assert said(ALL, start_step=10) == []
    dense = {"main": 2.0, "mtp": 0.0, "bits_per_byte": 3.0, "skipped": 0}  # no experts, nothing predicted ahead
    assert [line.split()[0] for line in said(dense)] == ["loss", "bits/byte", "skipped"]
    assert "explain" not in (tmp_path / "metrics.jsonl").read_text() and len(decided(tmp_path)) == 2


def test_the_loss_that_is_shown_does_not_depend_on_the_weights_of_other_losses(tmp_path):
    lines = []
    for total in (2.0 + 0.3 * 2.5, 2.0 + 0.1 * 2.5):  # the weight of MTP changes in the middle of a run
        with open_metrics(tmp_path, start_step=1) as metrics:
            metrics.step(2, ALL | {"loss": total})
        lines.append(metrics.stream.getvalue().partition("memory_gib")[0])
        assert decided(tmp_path)[0]["loss"] == total
    assert lines[0] == lines[1] and "loss=2.0000  mtp=2.5000  bits/byte=3.0000" in lines[0]


def tags(folder):
    """The tags in the event file of a folder, with the values of the scalars."""
    (file,) = folder.iterdir()
    events = events_of(file)
    return {value.tag: value.simple_value for event in events for value in event.summary.value}


def test_tensorboard_has_loss_first_and_held_out_text_in_the_same_chart(tmp_path):
    load_LE, names = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, 2.0]]), ["layer_01", "mtp_0"]
    figures = ALL | {"loss": 2.75, "expert_balance": 0.1, "checksum": 7.0, "learning_rate": 1e-3, "gradient_norm": 1.0}
    with open_metrics(tmp_path) as metrics:
        for step in (1, 2):
            metrics.step(step, figures, {"expert_load": load_LE, "router_bias": load_LE}, rows=names)
        metrics.evaluation(2, {"bits_per_byte": 3.5})
    train, held_out = (tags(tmp_path / "tensorboard" / side) for side in ("train", "held_out"))
    losses = ["loss/bits_per_byte", "loss/mtp", "loss/next_token", "loss/total"]
    assert sorted(train)[:5] == ["auxiliary_loss/expert_balance", *losses]
    assert held_out == {"loss/bits_per_byte": 3.5} and train["loss/bits_per_byte"] == 3.0
    groups = {tag.partition("/")[0] for tag in train}
    assert groups == {"auxiliary_loss", "loss", "optimizer", "routing", "speed"}
    for name in ("expert_load", "router_bias", "max_violation"):
        assert {f"routing/{name}/layer_01", f"routing/{name}/mtp_0"} <= train.keys()


def test_tensorboard_has_no_chart_of_a_line_at_0(tmp_path):
    zeros = dict.fromkeys(("mtp", "skipped", "skipped_in_row"), 0)
    with open_metrics(tmp_path) as metrics:
        metrics.step(1, {"main": 2.0, "loss": 2.0, "learning_rate": 0.0} | zeros)
    found = tags(tmp_path / "tensorboard" / "train")
    assert sorted(tag for tag in found if not tag.startswith("speed/")) == [
        "loss/next_token",
        "loss/total",
        "optimizer/learning_rate",  # 0 in the first step, not later
    ]
    with open_metrics(tmp_path / "later") as metrics:
        metrics.step(1, {"main": 2.0, "skipped": 1, "skipped_in_row": 1})
    assert tags(tmp_path / "later" / "tensorboard" / "train")["optimizer/skipped_steps"] == 1


def test_every_figure_of_a_step_has_a_place(tmp_path):
    from deepseek_jax.train.step import Report

    scalars = set(Report._fields) - {"auxiliary", "loads", "finite", "sent"} | {"bits_per_byte"}
    assert scalars == set(board.TAGS) | set(board.UNCHARTED)


RL = {"reward": 0.5, "accuracy": 0.25, "format": 1.0, "answer_length": 6.5, "tied": 0.0, "entropy": 0.7, "gap": 1e-6}


def test_figures_of_reinforcement_learning_have_the_names_of_the_field(tmp_path):
    from deepseek_jax.rl.grpo import Figures
    from deepseek_jax.rl.rewards import Response, Score
    from deepseek_jax.rl.step import reward_figures

    parts = {"accuracy": 1.0, "format": 0.0}
    found = reward_figures([Score(1.0, parts)], [Response({"content": "8"}, 3, 9, True)]).keys() | set(Figures._fields)
    assert found - board.RL_TAGS.keys() == parts.keys()
    with open_metrics(tmp_path) as metrics:
        metrics.step(1, RL | {"learning_rate": 1e-3})
        metrics.evaluation(1, RL)
        metrics.samples(1, ["2 + 2\n\n→ <think>hm</think>4"])
    train, held_out = (tags(tmp_path / "tensorboard" / side) for side in ("train", "held_out"))
    names = {"reward/total", "reward/accuracy", "reward/format", "answers/length", "reward/tied_groups"}
    names |= {"policy/entropy", "policy/gap"}
    assert {tag for tag in train if not tag.startswith("speed/")} == names | {"optimizer/learning_rate"}
    assert {tag for tag in held_out if "text_summary" not in tag} == names and len(held_out) == len(names) + 1
    (file,) = (tmp_path / "tensorboard" / "held_out").iterdir()
    texts = [value.tensor.string_val for event in events_of(file) for value in event.summary.value]
    assert ["    2 + 2\n\n    → <think>hm</think>4".encode()] in [list(text) for text in texts]


def test_the_live_view_of_reinforcement_learning_draws_the_reward(tmp_path):
    stream = io.StringIO()
    with open_metrics(tmp_path, stream=stream, live=True, verb="rl") as metrics:
        for step in (1, 2):
            metrics.step(step, RL | {"reward": step / 4})
    assert "deepseek-jax rl" in stream.getvalue() and "reward ▁█" in stream.getvalue()


def test_routers_are_called_by_their_layer_and_mtp_is_none():
    loads = {"moe_blocks": np.ones((3, 4)), "mtp": {"0": np.ones(4), "1": np.ones(4)}}
    layers = [*((("dense_blocks",), n) for n in range(2)), *((("moe_blocks",), n) for n in range(3))]
    assert list(router_places(loads, layers)) == ["layer_02", "layer_03", "layer_04", "mtp_0", "mtp_1"]
    assert router_places({}, layers) == {}


def test_rows_of_routers_follow_the_layers_of_a_group_and_of_stacks_in_their_order():
    """Layers 0 to 3 are the pairs of a group, 4 is hashed; `jax` sorts stack 10 before 2; integers are not biases."""
    group = ("blocks_2", "blocks")
    layers = [((*group, name), n) for n in range(2) for name in ("0", "1")] + [(("blocks_10",), 0)]
    loads = {
        "blocks_2": {"blocks": {"0": np.array([[0.0, 9], [2, 7]]), "1": np.array([[1.0, 8], [3, 6]])}},
        "blocks_10": np.array([[4.0, 5]]),
        "mtp": {"0": np.array([5.0, 4])},
    }
    biases = jax.tree.map(lambda load: {"experts": {"router": {"bias_E": -load}}}, loads)
    biases["blocks_10"] = {"experts": {"router": {"experts_VK": np.ones((1, 7, 2), np.int32)}}}
    places = router_places(loads, layers)
    assert list(places) == [*(f"layer_{n:02d}" for n in range(5)), "mtp_0"]
    load_LE, bias_LE = rows_of(loads, loads, places), rows_of(loads, biases, places)
    np.testing.assert_array_equal(load_LE[:, 0], [0, 1, 2, 3, 4, 5])
    np.testing.assert_array_equal(bias_LE, -load_LE * np.array([1, 1, 1, 1, 0, 1])[:, None])


def test_the_other_processes_write_nothing(tmp_path):
    with open_metrics(tmp_path / "none", enabled=False) as metrics:
        metrics.step(1, {"loss": 1.0})
        metrics.evaluation(1, {"loss": 1.0})
        metrics.message("silence")
    assert not (tmp_path / "none").exists() and metrics.stream.getvalue() == ""


def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another --workdir"):
        open_metrics(tmp_path / "file")


needs_full_disk = pytest.mark.skipif(not os.path.exists("/dev/full"), reason="this system has no /dev/full")


@needs_full_disk
def test_a_full_disk_ends_the_log_not_the_run(tmp_path):
    with open_metrics(tmp_path) as metrics:
        metrics.step(1, {"main": 1.0})
        metrics._log.close()
        metrics._log = open("/dev/full", "w")
        for step in (2, 3):
            metrics.step(step, {"main": 1.0})
        metrics.evaluation(3, {"main": 1.0})
    told = [line for line in metrics.stream.getvalue().splitlines() if "loss" not in line]
    assert told == ["metrics.jsonl ends at step 2: No space left on device. Training continues."]
    assert [record["step"] for record in decided(tmp_path)] == [1]


@needs_full_disk
@pytest.mark.parametrize("flush_s", [0.0, math.inf])
def test_a_full_disk_ends_the_charts_not_the_run(tmp_path, monkeypatch, flush_s):
    """Seen at a flush, or when the buffer overflows: some hundred figures later no call has waited for anything."""
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: open("/dev/full", "wb"))
    monkeypatch.setattr(board, "FLUSH_S", flush_s)
    figures = {f"figure_{number}": 1.0 for number in range(100)}
    with open_metrics(tmp_path, start_step=1) as metrics:
        for step in range(2, 8):
            metrics.step(step, {"loss": 1.0}, {"expert_load": np.ones((4, 8))})
            metrics.evaluation(step, figures)
    told = [line for line in metrics.stream.getvalue().splitlines() if "tensorboard" in line]
    assert len(told) == 1 and "No space left on device. Training continues." in told[0]
    assert len(decided(tmp_path)) == 12


@needs_full_disk
def test_a_full_disk_at_the_very_end_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("tensorboardX.record_writer.open_file", lambda path: open("/dev/full", "wb"))
    with open_metrics(tmp_path) as metrics:
        pass
    assert metrics.stream.getvalue() == "the last figures are lost: No space left on device.\n"


@needs_full_disk
def test_output_that_cannot_be_written_ends_nothing(tmp_path):
    stream = open("/dev/full", "w")
    with open_metrics(tmp_path, stream=stream) as metrics:
        metrics.message("8 devices")
        metrics.step(1, {"loss": 1.0})
    assert len(decided(tmp_path)) == 1
    with pytest.raises(OSError):
        stream.close()


def test_a_resumed_run_hides_the_charts_of_the_abandoned_path(tmp_path):
    run(tmp_path, [11], start_step=10)
    (events,) = (tmp_path / "tensorboard" / "train").iterdir()
    found = events_of(events)
    assert found[0].file_version == "brain.Event:2"
    assert found[1].step == 11 and found[1].session_log.status == found[1].session_log.START
    assert {event.step for event in found[2:]} == {11}


def events_of(file: Path) -> list:
    from tensorboardX.proto.event_pb2 import Event  # where torch is installed this imports it, which takes seconds

    return [Event.FromString(record) for record in records(file.read_bytes())]


def records(written: bytes):
    """Yields the records of an event file: length (8 bytes), its checksum (4), the record, its checksum (4)."""
    while written:
        length = int.from_bytes(written[:8], "little")
        yield written[12 : 12 + length]
        written = written[16 + length :]


def test_charts_that_cannot_be_opened_are_the_users_error(tmp_path):
    (tmp_path / "tensorboard").write_text("")
    with pytest.raises(UserError, match="another --workdir"):
        open_metrics(tmp_path)


@pytest.mark.parametrize("columns", ["20", "80", "200"])
def test_the_live_view_draws_at_any_width_and_leaves_the_last_state_after_ctrl_c(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    stream = io.StringIO()
    with pytest.raises(KeyboardInterrupt), open_metrics(tmp_path, stream=stream, live=True) as metrics:
        metrics.message("[not markup]")
        for step in (1, 2, 3):
            metrics.step(step, {"main": 6.0 - step, "mtp": 1.0}, {"expert_load": np.ones((1, 4))})
        metrics.evaluation(3, {"loss": 5.0})
        raise KeyboardInterrupt
    drawn = stream.getvalue()
    assert "[not markup]" in drawn.replace("\n", "")
    assert drawn.endswith("\x1b[?25h")  # the cursor is back
    last = drawn[drawn.rindex("╭") :]
    assert "loss" in last and "3" in last


def test_a_byte_tokenizer_turns_nats_into_bits():
    assert bits_per_byte(math.log(256), 1.0) == pytest.approx(8.0)
    assert bits_per_byte(math.log(256), 4.0) == pytest.approx(2.0)


def test_the_loads_of_the_last_logged_step_are_kept(tmp_path):
    with open_metrics(tmp_path) as metrics:
        for step in (1, 2):
            metrics.step(step, {"loss": 1.0}, {"expert_load": np.full((1, 2), step)}, rows=["layer_03"])
    kept = json.loads((tmp_path / EXPERT_LOADS).read_text())
    assert kept == {"step": 2, "layers": ["layer_03"], "tokens": [[2.0, 2.0]]}


def test_figures_of_an_exchange_by_hand(tmp_path):
    """Four experts on four devices, then on two; written beside the speed, for they depend on the mesh; explained."""
    sent = Sent(2.0**30, 2.0**31, np.zeros(2))
    report = SimpleNamespace(sent=sent, loads={"moe_blocks": np.array([[3.0, 5.0, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0]])})
    exchange = Exchange("expert", 4, 2)
    trainer = SimpleNamespace(run=SimpleNamespace(exchange=exchange), mesh=SimpleNamespace(size=8), step=None)
    figures = exchange_figures(trainer, report)
    assert figures == {"imbalance": 0.5, "sent_gib": 0.375, "crossing_gib": 0.25}
    trainer.run.exchange, trainer.step = Exchange("expert", 2), Attempts(lambda level: None)
    assert exchange_figures(trainer, report) == pytest.approx({"imbalance": 0.3, "sent_gib": 0.375, "repeated": 0})
    trainer.run.exchange = None
    assert exchange_figures(trainer, report) == {}
    stream = io.StringIO()
    with open_metrics(tmp_path, stream=stream) as metrics:
        metrics.step(1, {"loss": 1.0}, exchange=figures)
    assert "imbalance  " in stream.getvalue() and "crossing_gib=0.25" in stream.getvalue()
    assert read_log(tmp_path / "metrics.jsonl")[0]["speed"]["sent_gib"] == 0.375

"""deepseek-jax plan: every published figure on the screen, JSON that can be read back, a picture, clear refusals."""

import json
import sys

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.launch import plan

MARKS = {"derived", "published", "given", "fitted", "derived/published", "derived/given"}
LAYOUT = ["--chip=h800", "--devices=2048", "--config.mesh.pipe=16", "--config.mesh.expert=64"]


def planned(capsys, *words: str) -> dict:
    assert plan.main([*words, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(scope="module")
def v3():
    """What the verb prints, and its JSON, of the published run with every word given."""
    import contextlib
    import io

    texts = []
    for extra in ([], ["--json"]):
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            assert plan.main(["--config=v3_671b", *LAYOUT, *extra]) == 0
        texts.append(out.getvalue())
    return texts[0], json.loads(texts[1])


def test_a_checkpoint_of_fewer_devices_than_a_host_has(capsys):
    assert plan.main(["--config=tiny_v3", "--chip=h800", "--devices=1"]) == 0
    assert "its share of a save; one device at 1 GB/s takes" in capsys.readouterr().out


def test_a_step_of_reinforcement_learning(capsys):
    """The update's sequences are prompts with answers; what the drawing holds is counted by hand."""
    words = ["--config=tiny_zero", "--chip=h100", "--devices=1", "--rl"]
    found = planned(capsys, *words, "--config.rl.grpo.beta=0.1", "--config.rl.rows_at_once=32")
    n_numbers, cache = 218_048, 4 * (32 + 16) * 2  # the latent and the rotary key of two layers, float32
    expected = {
        "train_state": 12 * n_numbers + 4 * 8,
        "reference": 4 * n_numbers,
        "cache": 32 * 25 * cache,
        "logits": 32 * 272 * 8,
    }
    drawing = {name: value * 2**30 for name, value in found["figures"]["drawing"].items()}
    assert drawing == pytest.approx(
        {f"drawing_{name}_gib": n for name, n in expected.items()} | {"drawing_total_gib": sum(expected.values())}
    )
    assert found["figures"]["layout"]["tokens_per_step_count"] == 64 * 24
    with pytest.raises(UserError, match="--compile with --rl: it compiles a step of pre-training"):
        plan.main([*words, "--compile"])
    with pytest.raises(UserError, match=r"config.mesh.pipe=2: answers are drawn on whole models"):
        plan.main([*words, "--config.mesh.pipe=2"])
    with pytest.raises(UserError, match=r"config.rl.rows_at_once=7: expected a number that divides"):
        plan.main([*words, "--config.rl.rows_at_once=7"])
    with pytest.raises(UserError, match=r"config.rl.rollout=engine on 2 devices: expected one"):
        plan.main([*words, "--devices=2", "--config.rl.rollout=engine", "--config.rl.temperature=1.0"])


def line(text: str, label: str) -> str:
    return next(row for row in text.splitlines() if row.startswith(label))


@pytest.mark.parametrize(
    ("label", "figures"),
    [
        ("total  ", ["671.03 B", "derived"]),
        ("active per token", ["37.55 B", "derived"]),
        ("active, without the embedding", ["36.63 B", "derived", "convention"]),
        ("key-value cache per token", ["70,272 B"]),
        ("MFU, full attention", ["43.73 %"]),
        ("MFU, causal", ["38.94 %"]),
        ("step  ", ["19.926 s", "published"]),
        ("GPU hours per 1 T tokens", ["180,176 h"]),
        ("days per 1 T tokens", ["3.67 d"]),
        ("pre-training", ["2,664,000 h", "published"]),
        ("context extension", ["119,000 h", "published"]),
        ("post-training", ["5,000 h", "published"]),
        ("total           ", ["2,788,000 h", "derived/published"]),
        ("cost  ", ["5,576,000 $", "derived/published"]),
        ("does it fit?", ["yes, barely", "largest part: activations"]),
        ("checkpoint", ["3.01 GiB", "8 devices per host at 1 GB/s take 25.9 s"]),  # 8 x 3.01 x 2**30 / 1e9
    ],
)
def test_the_published_figures_are_printed(v3, label, figures):
    rows = [row for row in v3[0].splitlines() if row.startswith(label)]
    assert any(all(figure in row for figure in figures) for row in rows), rows


def test_the_figures_in_json(v3):
    figures, marks = v3[1]["figures"], v3[1]["marks"]
    assert figures["parameters"]["total_parameters"] == 671_026_404_352
    measured = figures["speed"]["measured"]
    assert round(measured["mfu_percent"], 2) == 43.73 and round(measured["mfu_causal_percent"], 2) == 38.94
    assert measured["step_s"] == 19.926 and marks["speed"]["measured"]["step_s"] == "published"
    assert marks["speed"]["calibrated"]["step_s"] == "fitted" and marks["speed"]["roofline"]["step_s"] == "derived"
    assert figures["published"]["total_cost_dollars"] == 5_576_000
    assert v3[1]["mesh"] == {"pipe": 16, "data": 2, "context": 1, "expert": 64}


def leaves(tree: dict, path: str = "") -> dict:
    found = {}
    for key, value in tree.items():
        found |= leaves(value, f"{path}{key}.") if isinstance(value, dict) else {f"{path}{key}": value}
    return found


def test_every_number_has_a_unit_and_a_mark(v3):
    figures, marks = leaves(v3[1]["figures"]), leaves(v3[1]["marks"])
    assert figures.keys() == marks.keys()
    assert set(marks.values()) <= MARKS
    units = ("_s", "_h", "_d", "_gib", "_gb", "_percent", "_count", "_parameters", "_embedding", "_dollars", "_billion")
    units += ("_token", "_per_device", "_per_stage")
    numbers = [key for key, value in figures.items() if isinstance(value, (int, float)) and not isinstance(value, bool)]
    assert [key for key in numbers if not key.endswith(units)] == []


def test_nothing_given_is_the_published_run(v3, capsys):
    assert planned(capsys) == v3[1]


@pytest.mark.slow
def test_v2_against_the_67b_before_it(capsys):
    found = planned(capsys, "--config=v2_236b")
    compared, marks = found["figures"]["compared"], found["marks"]["compared"]
    assert round(compared["training_hours_change_percent"], 1) == -42.5
    assert marks["training_hours_change_percent"] == "derived/published"
    assert round(compared["training_operations_change_percent"], 1) == -63.0
    assert marks["training_operations_change_percent"] == "derived"
    assert round(compared["kv_cache_change_percent"], 1) == -82.2


def test_a_step_that_was_measured(capsys):
    found = planned(capsys, "--config=tiny_v1", "--step-time-s=0.5", "--chip=mine:bf16=1,memory=16")
    assert found["figures"]["speed"]["measured"]["step_s"] == 0.5
    assert found["marks"]["speed"]["measured"] | {"step_s": "given"} == found["marks"]["speed"]["measured"]
    assert found["chip"] == "mine"


def test_a_plan_that_does_not_fit_says_so(capsys):
    words = ["--config=tiny_v1", "--chip=mine:bf16=1,memory=0.001"]
    assert plan.main([*words, "--config.batch.size=1", "--config.data.seq_len=16"]) == 0
    out = capsys.readouterr().out
    assert "NO" in line(out, "does it fit?") and "largest part: optimizer" in line(out, "does it fit?")
    assert "give more devices" in line(out, "  short by")
    assert plan.main([*words, "--config.batch.size=64"]) == 0
    assert "give more config.pipeline.micro_batches" in line(capsys.readouterr().out, "  short by")


def test_sums_over_micro_batches_are_named(capsys):
    for micro_batches, is_named in ((1, False), (4, True)):
        assert plan.main(["--config=tiny_v1", f"--config.pipeline.micro_batches={micro_batches}"]) == 0
        assert ("and their sums over micro-batches" in line(capsys.readouterr().out, "gradients")) == is_named


def test_other_schedules_stand_beside_the_chosen_one(capsys):
    sizes = ("--config.mesh.pipe=3", "--config.model.vocab_size=273", "--config.batch.size=12")
    found = planned(capsys, "--config=tiny_v1", *sizes)
    schedules = found["figures"]["schedules"]
    assert schedules["1f1b_bubble_roofline_s"] > schedules["zb1p_bubble_roofline_s"] > 0
    assert schedules["dualpipe_bubble_roofline_s"] is None  # three devices are an odd number


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--chip=h900"], "--chip=h900: no such chip. Choose one of h800"),
        (["--devices=2000"], "does not divide the 2000 devices"),
        (["--devices=1536", "--config.mesh.expert=48"], "256 experts over mesh axis 'expert' of size 48"),
        (["--config.mesh.pipe=62", "--devices=7936", "--schedule=1f1b"], "62 pipeline stages for 61 layers"),
        (["--config.batch.size=100"], "config.batch.size=100 does not divide"),
        (["--config.pipeline.micro_batches=7"], "Choose a divisor of 120"),
        (["--schedule=gpipe"], "no such schedule"),
        (["--recipe=fp4"], "no such recipe"),
        (["--price=-2"], "--price=-2.0: expected a number from"),
        (["--efficiency=1.5"], "--efficiency=1.5: expected a number from 1e-06 to 1, or 0"),
        (["--step-time-s=1e-300"], "--step-time-s=1e-300: expected a number from"),
        (["--against=v3"], "--against=v3: no such config"),
        (["--config.precision=fp2"], "config.precision='fp2': expected one of fp32, bf16, fp8"),
        (["--step-time-s=nan"], "--step-time-s=nan: expected a number from"),
        (["--picture=nowhere/at/all.png"], "--picture=nowhere/at/all.png: cannot be written"),
        (["--picture=/"], "--picture=/: expected a file that ends in"),
    ],
)
def test_what_cannot_be_is_refused(words, message):
    with pytest.raises(UserError) as error:
        plan.main(words)
    assert message in str(error.value)


def test_a_picture_of_the_memory(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    assert plan.main([f"--picture={tmp_path / 'memory.png'}"]) == 0
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"
    assert "memory drawn" in capsys.readouterr().out


def test_a_drawing_of_the_schedule(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    file = tmp_path / "schedule.svg"
    words = [
        f"--draw={file}",
        "--schedule=dualpipe",
        "--config=tiny_v1",
        "--config.mesh.pipe=2",
        "--config.pipeline.micro_batches=4",
    ]
    assert plan.main(words) == 0
    assert file.read_text().startswith("<?xml") and "schedule drawn" in capsys.readouterr().out


def test_there_is_no_schedule_without_a_pipeline(tmp_path):
    with pytest.raises(UserError, match="there is no pipeline to draw. Set --config.mesh.pipe=2"):
        plan.main(["--config=tiny_v3", f"--draw={tmp_path / 'schedule.svg'}"])


def test_a_picture_without_matplotlib_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install \"deepseek_jax\[notebooks\]\""):
        plan.main([f"--picture={tmp_path / 'memory.png'}"])


def test_nothing_is_published_of_a_model_that_was_changed(capsys):
    words = ["--config.model.n_layers=60", "--recipe=v3", "--config.batch.size=1", "--chip=h800:memory=99999"]
    found = planned(capsys, *words)
    assert "published" not in found["figures"] and "measured" not in found["figures"]["speed"]
    assert found["mesh"] == {"pipe": 1, "data": 1, "context": 1, "expert": 1}


def test_a_chip_that_differs_from_the_published_one_has_no_published_step(capsys):
    found = planned(capsys, "--chip=h800:memory=96")
    assert "measured" not in found["figures"]["speed"]
    assert found["figures"]["memory"]["chip_memory_gib"] == 96
    assert found["marks"]["memory"]["chip_memory_gib"] == "given"


def test_the_tokens_of_a_run_follow_its_batch_ramp(capsys):
    words = ["--config=tiny_v1", "--config.loop.steps=40", "--config.batch.size_start=4", "--step-time-s=1"]
    flat, ramped = (planned(capsys, *words, f"--config.batch.ramp_steps={n}") for n in (0, 20))
    hours = [found["figures"]["speed"]["measured"]["run_hours_h"] for found in (flat, ramped)]
    assert hours == pytest.approx([40 / 3600, 30 / 3600])  # 20 of the 40 steps read half a batch


def test_an_efficiency_that_is_given_is_not_fitted(capsys):
    words = ["--config=tiny_v1", "--config.mesh.pipe=2"]
    found = [planned(capsys, *words, *more)["marks"] for more in ([], ["--efficiency=0.5"])]
    assert [marks["speed"]["calibrated"]["step_s"] for marks in found] == ["fitted", "derived/given"]
    assert [marks["schedules"]["1f1b_step_calibrated_s"] for marks in found] == ["fitted", "derived/given"]


def test_another_price_is_marked(capsys):
    found = planned(capsys, "--price=3")
    assert found["figures"]["published"]["total_cost_dollars"] == 3 * 2_788_000
    assert found["marks"]["published"]["total_cost_dollars"] == "derived/given"


@pytest.mark.slow
def test_measured_loads_say_what_redundant_experts_gain(capsys, tmp_path):
    rng = np.random.default_rng(0)
    loads = rng.lognormal(size=(3, 16))
    file = tmp_path / "expert_load.json"
    file.write_text(json.dumps({"tokens": loads.tolist()}))
    words = ["--config=tiny_v3", "--devices=4", f"--loads={tmp_path}"]
    found = planned(capsys, *words, "--config.mesh.expert=4")["figures"]["balance"]
    devices = loads.reshape(3, 4, 4).sum(axis=-1)
    assert found["in_order_mean"] == pytest.approx((devices.max(axis=1) / devices.mean(axis=1) - 1).mean(), rel=1e-5)
    assert (
        max(found["redundant_1_mean"], found["redundant_2_mean"]) < found["redundant_0_mean"] < found["in_order_mean"]
    )
    with pytest.raises(UserError, match=r"--loads: the experts are all on one device"):
        plan.main(words)
    file.write_text("[]")
    with pytest.raises(UserError, match=rf"--loads={tmp_path}: no expert_load.json to be read there"):
        plan.main(words)
    file.write_text(json.dumps({"tokens": [[1.0, 2.0]]}))
    with pytest.raises(UserError, match=r"shape \(1, 2\), expected \[layers, 16\]"):
        plan.main(words)

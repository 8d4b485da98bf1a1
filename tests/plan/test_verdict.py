"""The five lines with which a plan starts, and why a utilization may be above 100 %."""

import re

import pytest

from deepseek_jax.launch import plan
from deepseek_jax.plan import step_time
from deepseek_jax.plan.verdict import PARTS, above, bottleneck, verdict


def test_a_plan_opens_with_five_lines(capsys):
    assert plan.main(["--config=tiny_v1", "--chip=h100"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("verdict")
    assert [line.split("  ")[0] for line in lines[3:8]] == ["fits", "bytes per device", "step", "MFU", "bottleneck"]
    assert "yes" in lines[3] and "train runs it" in lines[3] and "tokens per second" in lines[5]


def test_what_train_cannot_run_is_said(capsys):
    assert plan.main(["--config=tiny_v1", "--recipe=v3", "--config.batch.size_start=7"]) == 0
    assert "train cannot run it yet: V3's recomputation" in capsys.readouterr().out
    assert plan.main(["--config=tiny_v1", "--devices=4", "--config.batch.size_start=7"]) == 0
    assert "config.batch.size_start=7 does not divide" in capsys.readouterr().out


@pytest.mark.parametrize("part", PARTS)
def test_the_longest_part_is_the_bottleneck(job_of, part):
    job = job_of("tiny_v3", data=2, expert=2, sharding={"embed": "data"})
    times = dict.fromkeys(PARTS, 1.0) | {part: 4.0}
    name, advice = bottleneck(job, step_time.Step(**times))
    assert name == PARTS[part] and advice.startswith(f"{4 / (len(PARTS) + 3):.0%} of the step; ")


def test_the_verdict_follows_the_memory(job_of):
    job = job_of("tiny_v1", chip="l4")
    for n_bytes, answer in ((24 * 2**30, "yes"), (24 * 2**30 + 1, "NO")):
        fits = verdict(job, n_bytes, 0.22, "fitted", []).rows[0].figures[0]
        assert fits.text == answer and fits.value == (answer == "yes")


@pytest.mark.parametrize(
    "words, reasons",
    [
        (["--efficiency=1"], ["FP8 matmuls run at up to 2 x"]),
        (["--chip=tpu_v5p", "--step-time-s=1"], ["the given step"]),
        (
            ["--config=tiny_v1", "--step-time-s=1e-6", "--recipe=run"],
            ["half of the counted attention", "the given step"],
        ),
    ],
)
def test_more_than_all_of_the_peak_is_explained_where_it_stands(words, reasons, capsys):
    assert plan.main([*words]) == 0
    rows = [row for row in capsys.readouterr().out.splitlines() if row.startswith("MFU, ") and "TFLOP/s in" in row]
    rows = [row for row in rows if max(map(float, re.findall(r"([\d,.]+) %  ", row.replace(",", "")))) > 100]
    assert rows and all(reason in row for row in rows for reason in ["above 100 %", *reasons])


def test_nothing_is_explained_below(job_of):
    assert above(100.0, job_of("tiny_v1"), in_full=True, is_given=True) == ""

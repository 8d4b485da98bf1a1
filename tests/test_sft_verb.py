"""Supervised fine-tuning as a verb: the built-in conversations, and what it refuses."""

import json
import os

import numpy as np
import pytest

from deepseek_jax import run_config
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.files import write_once
from deepseek_jax.launch import _answers, _conversations, sft
from deepseek_jax.rl.problems import open_problems


def test_built_in_conversations_are_right_and_none_is_held_out(tmp_path, monkeypatch):
    monkeypatch.setattr(_conversations, "N_BUILT_IN", 500)
    config = run_config.load("tiny_sft")
    config.data.source = "sums:4"
    path = _conversations.write_built_in(config, tmp_path / "a" / "b.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 500
    held_out = open_problems("sums:4", 0, config.rl.holdout_rate)
    excluded = {held_out.held_out(n).messages[0]["content"] for n in range(500)}
    for row in rows:
        (asked, said), digits = row["messages"], [int(digit) for digit in row["messages"][0]["content"]]
        assert asked["content"] not in excluded and len(digits) == 4
        totals = np.cumsum(digits) % 10
        assert said["content"] == str(totals[-1])
        assert said["reasoning_content"] == "1" + "".join(map(str, totals[:-1])) + str(totals[-1])


@pytest.mark.parametrize("word", ["--config.data.source=stdlib", "--config.data.format=text"])
def test_text_is_not_fine_tuned_on(word, tmp_path):
    with pytest.raises(UserError, match=r"is text, not conversations. Give --config.data.source=FILES"):
        sft.main([word, f"--workdir={tmp_path}"])


def test_a_file_without_conversations_is_named_with_its_line(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"conversations": []}\n')
    with pytest.raises(UserError, match=r'a.jsonl, line 1 has "conversations". Rename it to "messages"'):
        sft.main([f"--config.data.source={tmp_path}/a.jsonl", f"--workdir={tmp_path}/run", "--config.mesh.data=1"])


def test_answers_are_compared_after_their_own_prompts():
    """Two examples and padding in a window; the second has two answers, of which the first is shown."""
    ids = np.arange(10, 20)[None]
    weights = np.array([[0, 1, 1, 0, 1, 0, 1, 0, 0, 0]], np.float32)
    segments = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0, 0]])
    batch = Batch(ids, ids + 1, segments, ids, weights)
    assert list(_answers.in_window(batch)) == [([10, 11], [12, 13]), ([13, 14], [15])]


def test_built_in_conversations_that_a_run_reads_stay(tmp_path, monkeypatch):
    monkeypatch.setattr(_conversations, "N_BUILT_IN", 5)
    config = run_config.load("tiny_sft")
    path = _conversations.write_built_in(config, tmp_path / "a.jsonl")
    before = path.read_bytes(), path.stat().st_ino
    _conversations.write_built_in(config, path)
    config.seed = 1
    with pytest.raises(UserError, match=r"a.jsonl holds other conversations than config.data.source=sums:6 gives with"):
        _conversations.write_built_in(config, path)
    assert (path.read_bytes(), path.stat().st_ino) == before


def test_two_processes_may_write_a_file_at_once(tmp_path, monkeypatch):
    link = os.link

    def meanwhile(partial, path):
        monkeypatch.setattr(os, "link", link)
        assert write_once(path, b"a")
        link(partial, path)

    for other in (b"a", b"b"):
        path = tmp_path / other.decode()
        monkeypatch.setattr(os, "link", meanwhile)
        assert write_once(path, other) == (other == b"a") and path.read_bytes() == b"a"
    monkeypatch.setattr(os, "link", lambda *paths: os.stat(tmp_path / "missing"))  # no links here
    assert write_once(tmp_path / "c", b"c") and not write_once(tmp_path / "c", b"d")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a", "b", "c"]

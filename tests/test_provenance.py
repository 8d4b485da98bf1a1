"""Marks of weights: those of what is read, and others for other weights."""

import json

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.launch._provenance import check_unchanged, mark_of
from deepseek_jax.train.checkpoint import manifest


def step(run, number):
    """A checkpoint without arrays."""
    path = manifest.step_dir(run / "checkpoints", number)
    path.mkdir(parents=True)
    (path / manifest.META).write_text(json.dumps({"at": number}))
    manifest.commit(path, number, {})
    return path


def test_the_mark_of_a_run_is_that_of_its_latest_intact_step(tmp_path):
    step(tmp_path, 20)
    before = mark_of(tmp_path)
    latest = step(tmp_path, 40)
    assert before["step"] == 20 and mark_of(tmp_path)["step"] == 40
    with pytest.raises(UserError, match="has changed while its weights were read: .*20.* was there, now it is .*40"):
        check_unchanged(tmp_path, before)
    (latest / manifest.META).write_text(json.dumps({"at": 41}))
    assert mark_of(tmp_path) == before
    check_unchanged(tmp_path, before)
    (manifest.step_dir(tmp_path / "checkpoints", 20) / manifest.META).unlink()
    with pytest.raises(UserError, match="has no intact checkpoint"):
        mark_of(tmp_path)


def test_other_published_weights_of_the_same_sizes_have_another_mark(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    file = tmp_path / "model.safetensors"
    marks = []
    for content in (b"", b"a" * 9, b"b" * 9, b"a" * 5_000_000, b"b" * 5_000_000, b"b" * 4_999_999 + b"a"):
        file.write_bytes(content)
        marks.append(mark_of(tmp_path)["files"])
    assert len({*marks}) == len(marks)

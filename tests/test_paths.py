"""Paths of other machines are reported in one line wherever a path may be given, and no folder is named after them."""

import os

import pytest

import deepseek_jax
from deepseek_jax import cli
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_local
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer

SOMEWHERE = ("gs://bucket/x", "s3://bucket/x", "hdfs://host:9000/x", "abfs://c@a/x", "https://example.com/x")
# What may be in a bucket, and so is looked for there.
IN_BUCKETS = [
    ["train", "--workdir={}"],
    ["train", "--config.run.init_from={}"],
    ["train", "--config={}"],
    ["train", "--config=tiny_v1", "--config.run.init_from={}"],
    ["generate", "--workdir={}", "--prompt=x"],
    ["convert", "--from={}", "--workdir=run"],
    ["export", "--workdir={}", "--to=out"],
    ["export", "--workdir=run", "--to={}"],
    ["inspect", "--workdir={}"],
    ["inspect", "--config={}"],
    ["plan", "--config={}"],
]
WORDS = [
    ["train", "--workdir={}"],
    ["train", "--config.data.source={}/*.txt"],
    ["train", "--config.data.cache_dir={}"],
    ["train", "--config.data.tokenizer={}/tokenizer.json"],
    ["train", "--config.release.folder={}"],
    ["train", "--config.checkpoint.local={}"],
    ["train", "--config.run.init_from={}"],
    ["train", "--config={}"],
    ["train", "--config=tiny_v1", "--config.run.init_from={}"],
    ["generate", "--workdir={}", "--prompt=x"],
    ["convert", "--from={}", "--workdir=run"],
    ["convert", "--from=run", "--workdir={}"],
    ["export", "--workdir={}", "--to=out"],
    ["export", "--workdir=run", "--to={}"],
    ["inspect", "--workdir={}"],
    ["inspect", "--config={}"],
    ["plan", "--config={}"],
]


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not [name for name in os.listdir() if ":" in name]


@pytest.mark.parametrize("words", WORDS, ids=" ".join)
def test_every_verb_says_so(words, capsys):
    for path in SOMEWHERE:
        is_bucket = path.startswith(("gs:", "s3:"))
        if is_bucket and words in IN_BUCKETS:
            continue
        assert cli.main([word.format(path) for word in words]) == 2
        told = capsys.readouterr().err
        assert told.count("\n") == 1 and path in told
        assert ("this one cannot be in" if is_bucket else "nothing is read from or written to") in told


@pytest.mark.parametrize("path", SOMEWHERE)
def test_every_function_says_so(path):
    for ask in (deepseek_jax.load, open_tokenizer, lambda path: open_corpus(path, "text"), Checkpointer):
        if ask in (Checkpointer, deepseek_jax.load) and path.startswith(("gs:", "s3:")):
            continue
        with pytest.raises(UserError, match="Give a path here"):
            ask(path)


def test_what_is_no_other_machine_passes():
    for path in (
        "runs/a",
        "/a/b",
        "~/a",
        "C:/models",
        "c:\\models",
        "a:b",
        "models--a--b",
        "",
        "x y/ü",
        "2024-01-01T10:00",
    ):
        check_local(path)


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("file:///data/model", "a plain path is expected here. Give /data/model"),
        ("https://huggingface.co/deepseek-ai/DeepSeek-V2-Lite/tree/main", "Give deepseek-ai/DeepSeek-V2-Lite there"),
        ("hf://deepseek-ai/DeepSeek-V2-Lite", "Give deepseek-ai/DeepSeek-V2-Lite there"),
        ("gs:/collapsed/by/pathlib", "--to=gs://collapsed/by/pathlib: .* such as gcsfuse"),
    ],
)
def test_what_may_have_been_meant_is_told(path, said):
    with pytest.raises(UserError, match=said):
        check_local(path, "--to")

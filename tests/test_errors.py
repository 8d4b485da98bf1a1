"""Wrong words, files and numbers from end to end: exit code 2, a line or two that say what to do, nothing lost."""

import io
import json
import shutil
from pathlib import Path

import jax.numpy as jnp
import pytest
from absl import logging
from ml_collections import ConfigDict

from deepseek_jax import cli, run_config
from deepseek_jax.configs import tiny_v3
from deepseek_jax.errors import UserError
from deepseek_jax.launch import bench
from deepseek_jax.models.v3 import Config
from deepseek_jax.saved_config import to_json
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer

NANO = str(Path(__file__).parent / "train" / "nano_v3.py")


@pytest.fixture
def refused(capsys, monkeypatch):
    """A function that runs the command line and returns what it says to a user who made a mistake."""
    monkeypatch.delenv("DEEPSEEK_JAX_DEBUG", raising=False)
    verbosity = logging.get_verbosity()

    def run(*argv: object) -> str:
        assert cli.main([str(word) for word in argv]) == 2
        said = capsys.readouterr().err
        assert said.startswith("deepseek-jax: error:"), said
        assert 1 <= len(said.splitlines()) <= 2, said
        assert "Traceback" not in said
        return said

    yield run
    logging.set_verbosity(verbosity)


@pytest.fixture
def text(tmp_path) -> Path:
    """A folder with ten documents."""
    folder = tmp_path / "text"
    folder.mkdir()
    for number in range(10):
        (folder / f"{number}.txt").write_text(f"document {number} says this and that\n" * 20)
    return folder


@pytest.fixture
def training(tmp_path, text) -> list[str]:
    """The words of a training run that would be in order."""
    words = [f"--config={NANO}", f"--workdir={tmp_path / 'run'}", "--no-sample"]
    return ["train", *words, f"--config.data.source={text}/*.txt", f"--config.data.cache_dir={tmp_path / 'cache'}"]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("--config.loop.stepz=3", "config.loop.stepz: no such key. Did you mean config.loop.steps?"),
        ("--config.loop.steps=many", "config.loop.steps=many: expected an int, like 60."),
        ("--config.run.init_from=nowhere", "config.run.init_from=nowhere: no such directory."),
        ("--config=tiny_v9", "--config=tiny_v9: no such config."),
        ("--config=base", "config base has no config.model."),
        ("--config.mesh.expert=3", "expert=3 does not divide the 8 devices."),
        ("--config.data.source=/no/such/folder/*.txt", "/no/such/folder/*.txt"),
        ("--config.data.tokenizer=/no/such/tokenizer.json", "there is no file /no/such/tokenizer.json."),
        ("--config.model.vocab_size=100", "Set --config.model.vocab_size=272 or more."),
    ],
)
def test_training_refuses(refused, training, tmp_path, word, message):
    overrides = word.startswith("--config=")
    said = refused(*(["train", word, f"--workdir={tmp_path / 'run'}"] if overrides else [*training, word]))
    assert message in said
    assert not (tmp_path / "cache").exists(), "what can be known first is checked before the text is tokenised"
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_workdir_that_cannot_be_written(refused, training, tmp_path):
    (tmp_path / "run").write_text("a file of the user's")
    assert f"{tmp_path / 'run'}: it is not a directory. Choose another --workdir." in refused(*training)
    assert not (tmp_path / "cache").exists()  # said before the text is tokenised
    assert (tmp_path / "run").read_text() == "a file of the user's"


def test_a_checkpoint_cut_short(refused, tmp_path):
    """The only checkpoint of a run is damaged: it is named, and left as it is."""
    config = to_json(run_config.load(NANO))
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": {"weight": jnp.arange(8.0)}}, {"config": config})
    damaged = tmp_path / "checkpoints/step_00000007/meta.json"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    before = contents(tmp_path)
    said = refused("generate", f"--workdir={tmp_path}", "--prompt=def")
    assert "no intact checkpoint in" in said and "step 7" in said and damaged.name in said
    assert contents(tmp_path) == before


def test_generate_without_a_run_or_a_readable_prompt(refused, tmp_path, monkeypatch):
    assert "no such directory" in refused("generate", f"--workdir={tmp_path / 'none'}", "--prompt=def")
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"caf\xe9 au lait"), encoding="utf-8"))
    assert "is not utf-8 text" in refused("generate", f"--workdir={tmp_path}")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", "--config.optimizer.moments_dtype=int7"], "config.optimizer.moments_dtype='int7'"),
        (["inspect", "--config=base"], "config base has no config.model."),
        (["inspect", "--config.model.n_groups=0"], "config.model.n_groups=0: expected a whole number from 1 to"),
        (["bench", "train", "--turns=0"], "--turns=0: expected a whole number from 1 to"),
        (["bench", "train", "--steps=-1"], "--steps=-1: expected a whole number from 1 to"),
        (["bench", "train", "--config.batch.size=3"], "config.batch.size=3"),
        (["bench"], "bench: nothing to measure was named. Give: deepseek-jax bench train |"),
        (["bench", "speed"], "bench speed: no such bench. Give: deepseek-jax bench train |"),
    ],
)
def test_other_verbs_refuse(refused, words, message):
    assert message in refused(*words)


@pytest.mark.parametrize("python", [shutil.which("false") or "false", "/no/such/python"])
def test_a_peer_that_does_not_start_is_named(python):
    with pytest.raises(UserError, match="the peer ended: no message|cannot be run"):
        bench.Peer(run_config.load("micro_v3"), python)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"d_model": 0}, "config.model.d_model=0: expected a whole number from 1 to"),
        ({"n_heads": 1.5}, "config.model.n_heads=1.5: expected a whole number from 1 to"),
        ({"n_shared_experts": -1}, "config.model.n_shared_experts=-1: expected a whole number from 0 to"),
        ({"mtp_depth": -1}, "config.model.mtp_depth=-1: expected a whole number from 0 to"),
        ({"n_dense_layers": -1}, "config.model.n_dense_layers=-1: expected a whole number from 0 to"),
        ({"n_groups": 5}, "Choose groups that divide the experts"),
        ({"top_groups": 99}, "Choose groups that divide the experts"),
        ({"top_k": 99}, "config.model.top_k=99"),
        ({"rope_width": 7}, "config.model.rope_width=7"),
        ({"yarn": ConfigDict({"factor": 4.0})}, "config.model.yarn has the keys factor"),
        ({"yarn": ConfigDict({"factor": 4.0, "original_length": 64, "speed": 1})}, "config.model.yarn has the keys"),
    ],
)
def test_sizes_that_make_no_model(change, message):
    m = ConfigDict(json.loads(tiny_v3.get_config().model.to_json()), convert_dict=True)
    with m.unlocked(), m.ignore_type():
        m.update(change)
    with pytest.raises(UserError) as error:
        Config.from_config(m)
    assert str(error.value).startswith(message) or message in str(error.value)


def test_a_model_that_lacks_a_key():
    m = tiny_v3.get_config().model
    with m.unlocked():
        del m["kv_rank"], m["yarn"]
    with pytest.raises(UserError, match="config.model needs kv_rank, yarn"):
        Config.from_config(m)

"""A run that begins with weights from elsewhere: what it takes from their directory, and what it refuses."""

import json
import os
import shutil
from pathlib import Path

import pytest

import deepseek_jax
from deepseek_jax import run, run_config
from deepseek_jax.convert import hub
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning, _options, convert, export, inspect, train
from deepseek_jax.models import FAMILIES, family
from deepseek_jax.saved_config import to_json
from deepseek_jax.train.checkpoint.manifest import commit
from deepseek_jax.train.loop import LoopConfig
from deepseek_jax.weights import open_weights

GOLDEN = Path(__file__).parent / "golden"
LETTERS = {chr(i): i - 32 for i in range(33, 90)} | {"</s>": 0, "?": 60}
WORDS = {"version": "1.0", "added_tokens": [], "pre_tokenizer": {"type": "Split", "pattern": {"Regex": "."}}}
WORDS["pre_tokenizer"] |= {"behavior": "Isolated", "invert": False}
WORDS["model"] = {"type": "WordLevel", "vocab": LETTERS, "unk_token": "?"}
GENERATION = {"eos_token_id": [0, 63], "temperature": 0.7}


@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "pub"
    shutil.copytree(GOLDEN / "llm", folder)
    (folder / "tokenizer.json").write_text(json.dumps(WORDS))
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    return folder


def parsed(*words):
    return _options.parse(list(words), "tiny_v3")


def resolved(*words, workdir="nowhere"):
    options = parsed(*words)
    _beginning.inherit(options.config, options.overrides, Path(workdir))
    return options.config


@pytest.mark.parametrize("word", ["--config={}", "--config.run.init_from={}"])
@pytest.mark.parametrize("name", ["llm", "r1_qwen", "moe", "v2", "v3_mtp"])
def test_a_directory_is_a_config(name, word):
    """Family and sizes are the directory's; the rest is a recipe that every check of the verb passes."""
    config = resolved(word.format(GOLDEN / name), "--config.loop.steps=7", "--config.data.tokenizer=bytes")
    source = open_weights(GOLDEN / name).config
    assert (config.family, config.model, config.precision) == (source.family, source.model, source.precision)
    assert config.run.init_from == str(GOLDEN / name) and config.loop.steps == 7
    assert config.data.seq_len == min(2048, source.data.seq_len)
    assert config.release.n_positions == source.data.seq_len
    assert bool(config.loss.mtp_weight) == (name == "v3_mtp")
    assert config.schedule.peak_rate == config.schedule.final_rate == 1e-5
    assert run_config.validate(config) is config
    LoopConfig(**config.loop, checkpoint_every=config.checkpoint.every), run.batch_ramp(config, 8)
    assert config.name == f"{name}_tuned"  # and so its workdir is not the directory of the weights


def test_every_family_with_routed_experts_balances_them_in_fine_tuning():
    assert set(_beginning.BALANCE) == {name for name in FAMILIES if "expert_width" in family(name).KEYS}


def test_the_tokenizer_beside_the_weights_is_taken_from_anywhere(published, tmp_path, monkeypatch, capsys):
    own = str(published / "tokenizer.json")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    for words in (["--config=../pub"], ["--config=llm_7b", "--config.run.init_from=../pub"]):
        config = resolved(*words)
        assert config.data.tokenizer == own
        assert f"tokenizer: {own}, which comes with" in capsys.readouterr().out
        assert config.release.end_ids == (0, 1, 63) and config.release.folder == str(published)
    shutil.copy(own, "same.json")  # the same under another name is the same
    assert resolved("--config=../pub", "--config.data.tokenizer=same.json").data.tokenizer == own


def test_a_tokenizer_of_other_words_is_refused_and_one_of_more_warned_of(published, tmp_path, capsys):
    other, more = tmp_path / "other.json", tmp_path / "more.json"
    swapped = LETTERS | {"T": LETTERS["O"], "O": LETTERS["T"]}
    other.write_text(json.dumps(WORDS | {"model": WORDS["model"] | {"vocab": swapped}}))
    more.write_text(json.dumps(WORDS | {"model": WORDS["model"] | {"vocab": LETTERS | {"another": 61}}}))
    for named in (other, "bytes"):
        with pytest.raises(UserError, match="reads text as other ids than .*tokenizer.json"):
            resolved(f"--config={published}", f"--config.data.tokenizer={named}")
    config = resolved(f"--config={published}", f"--config.data.tokenizer={more}")
    assert config.data.tokenizer == str(more) and config.release.end_ids == ()
    assert "reads a sample of text the same" in capsys.readouterr().out


def test_what_is_no_beginning_is_refused(published, tmp_path):
    with pytest.raises(UserError, match="config.run.init_from=nowhere: no such directory"):
        parsed("--config.run.init_from=nowhere")
    with pytest.raises(UserError, match="init_from=nowhere: no such directory"):
        resolved("--config=tiny_v1", "--config.run.init_from=nowhere", workdir="run")
    with pytest.raises(UserError, match="holds the weights to begin with"):
        resolved(f"--config={published}", workdir=published)
    with pytest.raises(UserError, match="brings no tokenizer.json"):
        resolved(f"--config={GOLDEN / 'llm'}")
    with pytest.raises(UserError, match=r"params/\S+ is .* there, .* in this run.*inspect --config="):
        _beginning.check_sizes(resolved("--config=tiny_v1", f"--config.run.init_from={published}"))


def test_the_user_may_say_otherwise(published):
    config = resolved(f"--config={published}", "--config.release.end_ids=(5,)", "--config.release.n_positions=9")
    assert config.release.end_ids == (5,) and config.release.n_positions == 9 and config.release.bos_id == 0


@pytest.mark.parametrize(
    "word", ["bos_id=-1", "pad_id=half", "eos_ids=(1, -2)", "end_ids=(16777217,)", "n_positions=-1", "end_ids=(True,)"]
)
def test_marks_that_are_none_are_refused_by_their_key(word):
    with pytest.raises(UserError, match=f"config.release.{word.partition('=')[0]}"):
        run_config.validate(parsed(f"--config.release.{word}").config)


def test_a_converted_run_is_a_beginning_as_well(published, tmp_path):
    convert.main([f"--from={published}", f"--workdir={tmp_path / 'run'}"])
    config = resolved(f"--config={tmp_path / 'run'}")
    assert config.data.tokenizer == str(tmp_path / "run" / "tokenizer.json") == open_weights(tmp_path / "run").tokenizer
    assert config.model == open_weights(published).config.model and config.release.end_ids == (0, 1, 63)
    _beginning.check_sizes(config)


def test_a_run_that_has_begun_needs_its_beginning_no_more(published, tmp_path):
    config = resolved(f"--config={published}")
    step = tmp_path / "run" / "checkpoints" / "step_00000003"
    step.mkdir(parents=True)
    (step / "config.json").write_text(json.dumps(to_json(config)))
    (step / "meta.json").write_text("{}")
    commit(step, 3, {})
    shutil.copy(published / "tokenizer.json", tmp_path / "run")
    words = ["--config=tiny_v1", f"--config.run.init_from={published}"]
    shutil.rmtree(published)
    assert resolved(*words, workdir=tmp_path / "run").data.tokenizer == str(tmp_path / "run" / "tokenizer.json")
    with pytest.raises(UserError, match="no such directory"):
        resolved(*words, workdir=tmp_path / "other")


def test_inspect_shows_the_numbers_of_a_directory(published, capsys):
    assert inspect.main([f"--config={published}"]) == 0
    out = capsys.readouterr().out
    for line in ("config.family = 'v1'", "config.model.vocab_size = 64", "config.model.rope_base = 10000.0"):
        assert line in out.splitlines()


def test_an_id_of_the_hub_is_a_beginning_of_which_only_what_is_said_is_fetched_first(published, monkeypatch, capsys):
    fetched = []
    monkeypatch.setattr(hub, "_download", lambda name, *_: fetched.append((name, _[-1])) or published)
    hub._snapshot.cache_clear()
    config = resolved("--config=some/llm")
    assert inspect.main(["--config=some/llm"]) == 0 and "family v1" in capsys.readouterr().out
    assert fetched == [("some/llm", hub.SMALL)]
    assert config.run.init_from == "some/llm" and config.model == open_weights(published).config.model
    assert config.data.tokenizer == str(published / "tokenizer.json") and config.release.end_ids == (0, 1, 63)
    _beginning.check_sizes(config)
    assert [patterns for _, patterns in fetched[1:]] == [hub.SMALL, (*hub.SMALL, *hub.WEIGHTS)]
    hub._snapshot.cache_clear()


@pytest.mark.slow
def test_fine_tuned_and_exported_it_says_what_the_source_says(published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(8):
        Path(f"{i}.txt").write_text(f"A FEW WORDS OF TEXT, NUMBER {i}, AND SOME MORE OF THEM " * 20)
    words = ["--config=pub", "--workdir=run", "--config.data.source=*.txt", "--config.data.seq_len=16", "--no-sample"]
    words += ["--config.loop.steps=2", "--config.data.holdout_rate=0", f"--config.data.cache_dir={tmp_path / 'cache'}"]
    assert train.main(words) == 0
    assert {"tokenizer.json", "generation_config.json", "chat_template.jinja"} <= {*os.listdir("run")}
    before, there = json.loads((published / "config.json").read_text()), deepseek_jax.load(published).end_ids
    shutil.rmtree(published)
    assert export.main(["--workdir=run", "--to=out"]) == 0
    after = json.loads(Path("out/config.json").read_text())
    kept = ("max_position_embeddings", "eos_token_id", "bos_token_id", "hidden_size")
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}
    assert json.loads(Path("out/generation_config.json").read_text()) == GENERATION
    assert Path("out/tokenizer.json").read_text() == json.dumps(WORDS)
    tuned = deepseek_jax.load("out")
    assert tuned.end_ids == there == (0, 1, 63) and tuned.n_positions == before["max_position_embeddings"]

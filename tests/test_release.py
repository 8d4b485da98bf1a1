"""What a directory says besides its weights is honoured, and written again unless the user has changed it."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

import deepseek_jax
from deepseek_jax import release, run_config
from deepseek_jax.data.chat import jinja, recognise
from deepseek_jax.data.chat.published import NEEDED
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.launch import convert, export
from deepseek_jax.weights import open_weights

GOLDEN = Path(__file__).parent / "golden"
WORDS = {"version": "1.0", "added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2}}}
WORDS["model"]["unk_token"] = "a"
SETTINGS = {"temperature": 0.6, "top_p": 0.95, "do_sample": True, "transformers_version": "4.39.3"}
# Files that say nothing to this project, and come along byte by byte.
OTHERS = {
    "special_tokens_map.json": b'{"eos_token": "b"}',
    "chat_template.jinja": b"{{ messages }}\n",
    "merges.txt": b"a b\n",
    "LICENSE-MODEL": b"as is",
}
NOT_KEPT = {"README.md": b"# card", "pytorch_model.bin": b"pickled", "notes.json": b"{}"}


@pytest.fixture
def published(tmp_path):
    """A function that makes a directory as others publish it: these ends in config.json, those for generation."""

    def make(eos, generation=None, tokenizer: str | None = "b", **config) -> Path:
        folder = tmp_path / "published"
        shutil.copytree(GOLDEN / "llm", folder)
        said = json.loads((folder / "config.json").read_text()) | {"eos_token_id": eos} | config
        (folder / "config.json").write_text(json.dumps(said))
        if generation is not None:
            (folder / "generation_config.json").write_text(json.dumps(SETTINGS | {"eos_token_id": generation}))
        if tokenizer:
            (folder / "tokenizer.json").write_text(json.dumps(WORDS))
            (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": tokenizer, "model_max_length": 9}))
        for name, content in (OTHERS | NOT_KEPT).items():
            (folder / name).write_bytes(content)
        return folder

    return make


@pytest.fixture
def published_moe(tmp_path):
    """DeepSeekMoE 16B's layout, with the code that its release ships."""
    folder = tmp_path / "published"
    shutil.copytree(GOLDEN / "moe", folder)
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        (folder / name).write_text(f"# {name}\n")
    return folder


def said(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


def exported(source: Path, way: str) -> Path:
    """Out again, from memory or through a checkpoint."""
    out, run = source.parent / "out", source.parent / "run"
    if way == "memory":
        deepseek_jax.save_pretrained(deepseek_jax.load(source), out, "keep")
    else:
        convert.main([f"--from={source}", f"--workdir={run}"])
        shutil.rmtree(source)  # from here on the run stands alone, and it may move
        run.rename(source.parent / "moved")
        export.main([f"--workdir={source.parent / 'moved'}", f"--to={out}"])
    return out


# (config.json, generation_config.json, tokenizer) -> all the ends
ENDS = [
    (1, None, None, (1,)),
    (1, [3, 1], None, (1, 3)),
    ([5, 1], None, None, (1, 5)),
    ([5, 1], 7, "b", (1, 2, 5, 7)),
    (None, [3, 4], "b", (2, 3, 4)),
    (None, None, "b", (2,)),
    (None, None, None, ()),
]


@pytest.mark.parametrize(("eos", "generation", "tokenizer", "ends"), ENDS)
def test_generation_ends_at_every_mark_that_any_file_names(published, eos, generation, tokenizer, ends):
    config = open_weights(published(eos, generation, tokenizer)).config
    assert release.marks(config, open_tokenizer(config.data.tokenizer)).end_ids == ends


@pytest.mark.parametrize(
    ("way", "eos", "generation", "tokenizer", "ends"),
    [
        pytest.param("memory", *ENDS[0], marks=pytest.mark.slow),
        ("memory", *ENDS[3]),
        pytest.param("checkpoint", *ENDS[2], marks=pytest.mark.slow),
        ("checkpoint", *ENDS[3]),
    ],
)
def test_what_is_exported_says_what_the_source_said(published, way, eos, generation, tokenizer, ends):
    source = published(eos, generation, tokenizer, max_position_embeddings=777, pad_token_id=6)
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    out = exported(source, way)
    kept = ("eos_token_id", "bos_token_id", "pad_token_id", "max_position_embeddings")
    assert {key: said(out)[key] for key in kept} == {key: json.loads(before["config.json"])[key] for key in kept}
    same = {*OTHERS, *(("tokenizer.json", "tokenizer_config.json") if tokenizer else ())}
    assert {name: (out / name).read_bytes() for name in same} == {name: before[name] for name in same}
    assert not {*NOT_KEPT} & {file.name for file in out.iterdir()}
    if generation is not None:
        assert said(out, "generation_config.json") == json.loads(before["generation_config.json"])
    assert deepseek_jax.load(out).end_ids == ends


def test_what_the_user_changes_is_written(published, tmp_path):
    model = deepseek_jax.load(published([5, 1], [5, 1, 3]))
    assert model.generation_config["temperature"] == 0.6
    with model.config.unlocked():
        model.config.release.update(end_ids=(1, 5, 9), n_positions=64)
        model.config.data.seq_len = 100
    deepseek_jax.save_pretrained(model, tmp_path / "out")
    assert said(tmp_path / "out")["max_position_embeddings"] == 100
    assert said(tmp_path / "out")["eos_token_id"] == [5, 1]
    written = said(tmp_path / "out", "generation_config.json")
    assert written == SETTINGS | {"eos_token_id": [1, 5, 9], "bos_token_id": 0}


def test_another_tokenizer_brings_its_own_marks(published, tmp_path):
    model = deepseek_jax.load(published(1, [1, 3]))
    other = tmp_path / "other" / "words.json"
    other.parent.mkdir()
    other.write_text(json.dumps(WORDS | {"model": WORDS["model"] | {"vocab": {"a": 0, "</s>": 9}}}))
    with model.config.unlocked():
        model.config.data.tokenizer = str(other)
    assert model.end_ids == (9,)
    deepseek_jax.save_pretrained(model, tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_bytes() == other.read_bytes()
    assert said(tmp_path / "out")["eos_token_id"] == 9
    assert said(tmp_path / "out", "generation_config.json")["eos_token_id"] == 9
    assert not {"tokenizer_config.json", "chat_template.jinja"} & {file.name for file in (tmp_path / "out").iterdir()}


def test_a_source_that_is_gone_is_named(published, tmp_path):
    model = deepseek_jax.load(published(1))
    model.tokenizer  # noqa: B018 - opened while it was there
    shutil.rmtree(model.config.release.folder)
    with pytest.raises(UserError, match="published.*"):
        deepseek_jax.save_pretrained(model, tmp_path / "out")


@pytest.mark.parametrize("eos", [-1, "1", {"a": 1}, [1] * 101, 1.5])
def test_an_end_that_is_none_is_refused_by_its_file(published, eos):
    with pytest.raises(UserError, match="generation_config.json: eos_token_id"):
        assert open_weights(published(1, eos)).config


def test_positions_are_those_of_the_release_or_of_training_if_more(published):
    config = open_weights(published(1, max_position_embeddings=512)).config.unlock()
    for seq_len, positions in ((32, 512), (512, 512), (1024, 1024)):
        config.data.seq_len = seq_len
        assert release.n_positions(config) == positions


@pytest.mark.parametrize("way", ["memory", "checkpoint"])
def test_code_without_which_nobody_opens_an_export_comes_along(published_moe, way, capsys):
    out = exported(published_moe, way)
    for name in ("configuration_deepseek.py", "modeling_deepseek.py"):
        assert (out / name).read_text() == f"# {name}\n"
    assert said(out)["auto_map"] == {
        "AutoConfig": "configuration_deepseek.DeepseekConfig",
        "AutoModel": "modeling_deepseek.DeepseekModel",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekForCausalLM",
    }
    assert "only deepseek_jax can open" not in capsys.readouterr().err


def test_without_that_code_an_export_says_that_nobody_opens_it(published_moe, capsys):
    (published_moe / "modeling_deepseek.py").unlink()
    out = exported(published_moe, "memory")
    assert "auto_map" not in said(out)
    err = capsys.readouterr().err
    assert "configuration_deepseek.py and modeling_deepseek.py" in err and "only deepseek_jax can open" in err


def test_models_that_transformers_has_a_class_for_bring_no_code(published):
    folder = published(1)
    (folder / "modeling_deepseek.py").write_text("")
    out = exported(folder, "memory")
    assert not list(out.glob("*.py")) and "auto_map" not in said(out)


def test_a_model_tuned_with_a_named_template_brings_its_file(tmp_path):
    """Also one whose files have another template; not if they have this one, and not for a corpus of text."""
    config = run_config.load("tiny_v3")
    config.data.update(format="conversations", chat_template="v31")
    assert recognise(release.files(config)[jinja.NAME].decode()) == "v31"
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS))
    config.data.tokenizer = str(tmp_path / "tokenizer.json")
    for text in ("", jinja.TEXTS["v3"]):
        (tmp_path / jinja.NAME).write_text(text)
        assert recognise(release.files(config)[jinja.NAME].decode()) == "v31"
    (tmp_path / jinja.NAME).write_text(jinja.TEXTS["v31"])
    assert release.files(config)[jinja.NAME] == tmp_path / jinja.NAME
    (tmp_path / jinja.NAME).unlink()
    config.data.format = "text"
    assert jinja.NAME not in release.files(config)


@pytest.mark.parametrize("name", ["v32", "v4"])
def test_a_model_tuned_with_a_template_without_a_file_brings_no_other(tmp_path, capsys, name):
    """The model_type tells, where it is that template's; else a line does."""
    config = run_config.load("tiny_v3")
    config.data.update(format="conversations", chat_template=name, tokenizer=str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer.json").write_text(json.dumps(WORDS))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "b"}))
    assert release.files(config)["tokenizer_config.json"] == tmp_path / "tokenizer_config.json"
    assert capsys.readouterr().err == ""
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "b", "chat_template": jinja.TEXTS["v31"]}))
    (tmp_path / jinja.NAME).write_text(jinja.TEXTS["v31"])
    found = release.files(config)
    assert json.loads(found["tokenizer_config.json"]) == {"eos_token": "b"} and jinja.NAME not in found
    assert (
        capsys.readouterr().err == f"chat template: the files' own is left out, since the model is tuned with {name}\n"
    )
    told = "model_type deepseek_v3 stands for no template"
    assert release.remark(config) == f"chat template: {told}: give --template={name} to chat and serve"
    config.family = "v4"
    assert (release.remark(config) == "") == (name == "v4")
    config.data.format = "text"
    assert release.remark(config) == "" and release.files(config)[jinja.NAME] == tmp_path / jinja.NAME


def test_the_chat_template_of_models_that_come_without_one(tmp_path):
    """Named in the config, so that runs which begin with such weights know it."""
    published = SimpleNamespace(config={"model_type": "deepseek_v32"})
    (tmp_path / "config.json").write_text(json.dumps(published.config))
    assert release.chat_template(published, tmp_path) == ""  # a base: its tokenizer has no special tokens of the format
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": [{"content": mark} for mark in NEEDED]}))
    assert release.chat_template(published, tmp_path) == "v32"
    assert release.chat_template(SimpleNamespace(config={"model_type": "deepseek_v3"}), tmp_path) == ""
    (tmp_path / jinja.NAME).write_text(jinja.TEXTS["v31"])
    assert release.chat_template(published, tmp_path) == ""

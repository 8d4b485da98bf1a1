"""The command line: what is listed, what is said of wrong words, and how options reach a config."""

import json
import re
import subprocess
import sys
import types
from pathlib import Path

import pytest

import deepseek_jax
from deepseek_jax import cli, run_config
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _hints, _options
from deepseek_jax.saved_config import from_json, leaves, to_json


@pytest.fixture
def verb(tmp_path, monkeypatch):
    """A folder of verbs with `greet`, whose `main` a test may replace."""
    (tmp_path / "greet.py").write_text('"""Says hello.\n\nAt length."""\nraise RuntimeError("imported")\n')
    (tmp_path / "farewell.py").write_text('"""Says goodbye."""\n')
    (tmp_path / "_private.py").write_text('"""No verb."""\n')
    monkeypatch.setattr(cli, "verbs", lambda: {file.stem: file for file in sorted(tmp_path.glob("[!_]*.py"))})
    monkeypatch.setattr(cli, "quieten", lambda: None)
    monkeypatch.delenv("DEEPSEEK_JAX_DEBUG", raising=False)
    module = types.ModuleType("deepseek_jax.launch.greet")
    module.main = lambda argv: None
    monkeypatch.setitem(sys.modules, "deepseek_jax.launch.greet", module)
    return module


@pytest.mark.parametrize("argv", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_each_verb_with_its_first_line_and_imports_none(verb, capsys, argv):
    assert cli.main(argv) == 0
    out = capsys.readouterr().out
    assert "  farewell  Says goodbye.\n  greet     Says hello." in out
    assert "private" not in out


def test_the_real_verbs_are_the_public_files_of_launch():
    assert set(cli.verbs()) >= {"train", "generate", "inspect", "bench"}
    assert not [name for name in cli.verbs() if name.startswith("_")]


def test_help_of_a_verb_prints_its_whole_docstring_and_then_asks_the_verb(verb, capsys):
    verb.main = lambda argv: print(argv)
    assert cli.main(["greet", "--help"]) == 0
    assert capsys.readouterr().out == "Says hello.\n\nAt length.\n\n['--help']\n"


def test_the_exit_code_is_the_verbs(verb):
    verb.main = lambda argv: len(argv)
    assert cli.main(["greet", "a", "b", "c"]) == 3
    verb.main = lambda argv: None
    assert cli.main(["greet"]) == 0


@pytest.mark.parametrize("name", cli.NO_VERBS)
def test_a_verb_that_people_expect_is_answered_with_what_there_is(name, capsys):
    assert name not in cli.verbs()
    assert cli.main([name]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"deepseek-jax: error: {name}: no such verb. ")
    assert set(re.findall(r"deepseek-jax (\w+)", error)) <= cli.verbs().keys()


def test_an_unknown_verb_is_one_line_with_the_nearest(verb, capsys):
    assert cli.main(["gret"]) == 2
    assert capsys.readouterr().err == "deepseek-jax: error: gret: no such verb. Did you mean greet?\n"


def test_flags_before_the_verb_are_said_to_come_after(verb, capsys):
    assert cli.main(["--config=tiny_v3"]) == 2
    said = capsys.readouterr().err
    assert "the verb comes first, like deepseek-jax train --config=tiny_v3. Verbs: farewell, greet." in said


def test_every_familiar_name_is_a_key_that_exists():
    keys = leaves(run_config.load("base"))
    assert set(_hints.FAMILIAR.values()) <= keys.keys()


def test_a_user_error_is_one_line_without_traceback(verb, capsys, monkeypatch):
    def main(argv):
        raise UserError("no such thing")

    verb.main = main
    assert cli.main(["greet"]) == 2
    assert capsys.readouterr().err == "deepseek-jax: error: no such thing\n"
    monkeypatch.setenv("DEEPSEEK_JAX_DEBUG", "1")
    with pytest.raises(UserError):
        cli.main(["greet"])


def test_ctrl_c_is_quiet(verb, capsys):
    def main(argv):
        raise KeyboardInterrupt

    verb.main = main
    assert cli.main(["greet"]) == 130
    assert capsys.readouterr().err == ""


def test_a_fault_of_ours_keeps_its_traceback(verb):
    verb.main = lambda argv: 1 / 0
    with pytest.raises(ZeroDivisionError):
        cli.main(["greet"])


def test_the_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "deepseek_jax", "--version"], capture_output=True, text=True)
    first, *others = done.stdout.splitlines()
    assert (done.returncode, first) == (0, f"deepseek-jax {deepseek_jax.__version__}")
    assert [line.split()[0] for line in others[:4]] == ["python", "jax", "jaxlib", "flax"] and "(cpu)" in others[-1]
    done = subprocess.run([sys.executable, "-m", "deepseek_jax", "no-such-verb"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("deepseek-jax: error: no-such-verb") and done.stderr.count("\n") == 1


# Options.

HERE = str(Path(__file__).parent)
CARD = '''
"""A card."""
from ml_collections import ConfigDict
def get_config():
    config = ConfigDict({"name": "", "seed": 0, "rate": 0.5, "mask": False, "text": "x", "shape": (1, 2), "none": None})
    config.loop = ConfigDict({"steps": 10, "tail": ConfigDict({"steps": 3})})
    return config
'''


@pytest.fixture
def card(tmp_path):
    path = tmp_path / "card.py"
    path.write_text(CARD)
    return str(path)


def test_overrides_are_typed_by_the_config_in_both_spellings(card):
    options = _options.parse(
        ["--config", card, "--config.loop.steps=7", "--config.seed", "-1", "--config.rate=1", "--config.mask=true",
         "--config.shape=(3,)", "--config.none=5", "--config.text=a=b", "--config.loop.tail.steps=1"]
    )  # fmt: skip
    config = options.config
    assert (config.loop.steps, config.seed, config.mask, config.shape) == (7, -1, True, (3,))
    assert (config.none, config.text, config.loop.tail.steps) == (5, "a=b", 1)
    assert config.rate == 1.0 and isinstance(config.rate, float)
    assert options.overrides["loop.steps"] == "7"
    assert options.workdir is None


def test_the_last_of_two_overrides_wins_and_the_config_is_named_and_locked(card):
    config = _options.parse([f"--config={card}", "--config.seed=1", "--config.seed=2"]).config
    assert (config.seed, config.name) == (2, "card")
    with pytest.raises(AttributeError):
        config.sede = 1


def test_a_key_under_its_earlier_name_is_taken_and_its_present_name_reported(card, capsys):
    options = _options.parse([f"--config={card}", "--config.train.steps=7"])
    assert (options.config.loop.steps, options.overrides) == (7, {"loop.steps": "7"})
    assert capsys.readouterr().err == "note: config.train.steps is now called config.loop.steps\n"


def test_a_file_is_named_after_itself_and_not_after_its_parent(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("from deepseek_jax.configs import tiny_v3\ndef get_config(): return tiny_v3.get_config()\n")
    assert (run_config.load(str(path)).name, run_config.load("tiny_v3").name) == ("mine", "tiny_v3")


def test_a_name_finds_a_config_of_the_package():
    assert _options.parse([], default_config="base").config.loop.steps == 1000
    assert "base" not in run_config.names() and "__init__" not in run_config.names()


@pytest.mark.parametrize("name", run_config.names())
def test_every_config_of_the_package_loads_and_survives_json(name):
    config = run_config.load(name)
    assert config.name
    assert from_json(json.loads(json.dumps(to_json(config)))) == config


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config.loop.stepz=1"], "config.loop.stepz: no such key. Did you mean config.loop.steps?"),
        (["--config.train.log_evry=1"], "config.train.log_evry: no such key. "),
        (["--config.zzzzzz=1"], "config.zzzzzz: no such key. Keys of config: "),
        (["--config.seed.x=1"], "config.seed.x: no such key."),
        (["--config.loop.steps=abc"], "config.loop.steps=abc: expected an int, like 10."),
        (["--config.loop.steps=1.5"], "config.loop.steps=1.5: expected an int"),
        (["--config.rate=fast"], "config.rate=fast: expected a float"),
        (["--config.mask=perhaps"], "config.mask=perhaps: expected a bool"),
        (["--config.loop=1"], "config.loop is a group of keys"),
        (["--config.seed"], "--config.seed needs a value."),
        (["--workdr=x"], "--workdr: no such flag. Did you mean --workdir=x? Flags: "),
        (["--workdir="], "--workdir='': expected a path, not empty"),
        (["workdir=x"], "workdir=x: unexpected argument. Did you mean --workdir=x?"),
        (["-workdir=x"], "-workdir=x: unexpected argument. Did you mean --workdir=x?"),
        (["config.loop.steps=5"], "config.loop.steps=5: unexpected argument. Did you mean --config.loop.steps=5?"),
        (["steps=5"], "steps=5: unexpected argument. Did you mean --config.loop.steps=5?"),
        (["tiny_v3"], "tiny_v3: unexpected argument. Did you mean --config=tiny_v3?"),
        ([__file__], f"{__file__}: unexpected argument. Did you mean --config={__file__}?"),
        (
            [str(Path(__file__).parent)],
            f"{Path(__file__).parent}: unexpected argument. Did you mean --config.data.source=",
        ),
        (["what"], "what: unexpected argument. Write values as --name=VALUE; see --help."),
        (["--steps=100"], "--steps: no such flag. Did you mean --config.loop.steps=100?"),
        (["--train.steps=100"], "--train.steps: no such flag. Did you mean --config.loop.steps=100?"),
        (["--batch-size", "8"], "--batch-size: no such flag. Did you mean --config.batch.size?"),
        (["--lr=1e-3"], "--lr: no such flag. Did you mean --config.schedule.peak_rate=1e-3?"),
        (["--every=3"], "--every: no such flag. Did you mean --config.checkpoint.every=3?"),
        (["--step=3"], "--step: no such flag. Did you mean --config.loop.steps=3 or --config.profile.steps=3?"),
        (["--out-dir=x"], "--out-dir: no such flag. Did you mean --workdir=x?"),
        (["--zzz=1"], "--zzz: no such flag. Flags: --config, --workdir, --count, --loud, --config.a.b=VALUE."),
        (["--count=many"], "--count=many: expected an int (how many)."),
        (["--loud=perhaps"], "--loud=perhaps: expected true or false."),
        (["--no-count"], "--no-count: no such flag."),
    ],
)
def test_a_wrong_word_is_named_with_what_was_wanted(card, words, message):
    with pytest.raises(UserError) as error:
        _options.parse([f"--config={card}", *words], extra={"count": (int, 1, "how many"), "loud": (bool, False, "")})
    assert str(error.value).startswith(message)
    assert len(str(error.value).splitlines()) <= 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def get_config(): return 1 / 0", "the file raised ZeroDivisionError: division by zero (line 1 of "),
        ("def get_config(: pass", "the file raised SyntaxError"),
        (
            "from deepseek_jax.configs import tiny_v3\ndef get_config():\n    tiny_v3.get_config().train.steps = 1",
            "(line 3 of FILE). The keys of config.train are now in config.batch, config.loop, config.loss, "
            "config.pipeline, config.run: "
            "rename them.",
        ),
        ("x = 1", "the file has no function get_config()."),
        ("def get_config(): return {}", "get_config() gave a dict"),
    ],
)
def test_a_config_file_that_fails_is_the_users_error(tmp_path, source, message):
    path = tmp_path / "wrong.py"
    path.write_text(source)
    with pytest.raises(UserError, match="wrong.py") as error:
        _options.parse([f"--config={path}"])
    assert message.replace("FILE", str(path)) in str(error.value)


def test_a_config_that_is_not_there():
    with pytest.raises(UserError, match="no such file"):
        _options.parse(["--config=nowhere/a.py"])
    with pytest.raises(UserError, match="no such config"):
        _options.parse(["--config=nowhere"])
    with pytest.raises(UserError, match="no config"):
        _options.parse(["--config.seed=1"])


def test_a_verbs_own_flags():
    extra = {"prompt_text": (str, "", "text"), "count": (int, 3, "how many"), "loud": (bool, True, "aloud")}
    options = _options.parse(["--prompt-text", "a b", "--no-loud"], extra=extra, config=False)
    assert (options.prompt_text, options.count, options.loud, options.config) == ("a b", 3, False, None)
    assert _options.parse(["--loud"], extra=extra).loud is True
    with pytest.raises(UserError, match="--file is missing"):
        _options.parse([], extra={"file": (str, _options.REQUIRED, "what to read")})
    with pytest.raises(UserError, match="no such flag"):
        _options.parse(["--config=base"], config=False)


def test_help_lists_the_options(capsys):
    with pytest.raises(SystemExit) as stop:
        _options.parse(["--help"], default_config="tiny", extra={"count": (int, 3, "how many")})
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for word in ("--config=VALUE", "(default: tiny)", "--workdir=VALUE", "--count=VALUE", "--config.a.b=VALUE"):
        assert word in out

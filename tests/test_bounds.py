"""Every key of a config and every flag of a verb has bounds; what lies outside is refused in a line."""

import functools
import importlib
import math
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from deepseek_jax import cli, run_bounds, run_config
from deepseek_jax.bounds import besides, in_line, name, number, optional, path, several, shown, text, whole
from deepseek_jax.data.conversations import TRAIN_ON
from deepseek_jax.data.rows import FORMATS
from deepseek_jax.errors import UserError
from deepseek_jax.launch import (
    _bench_kernels,
    _bench_rl,
    _options,
    _scaling,
    bench,
    chat,
    convert,
    evaluate,
    export,
    generate,
    plan,
    prepare,
    sample,
    serve,
    sft,
    supervise,
    train,
)
from deepseek_jax.launch import inspect as inspect_verb
from deepseek_jax.layers.base import REMAT
from deepseek_jax.models import FAMILIES
from deepseek_jax.models.checks import GROUPS
from deepseek_jax.parallel.mesh import REPLICAS
from deepseek_jax.precision.policy import POLICIES

NANO = str(Path(__file__).parent / "train" / "nano_v3.py")
MODELS = {"tiny_v1": "v1", "tiny_moe": "moe", "tiny_v2": "v2", "tiny_v3": "v3", "tiny_v32": "v32", "tiny_v4": "v4"}
NEVER = [
    math.nan,
    math.inf,
    -math.inf,
    -(10**18),
    2**64,
    10**5000,
    b"x",
    object(),
    {1: 2},
    {"a": {}},
    "\0",
]
NEVER += [[math.nan], (None, 1), len, "x" * 5_000 + "/" + "y" * 300, -1.5, 1e300, ("a" * 300,), 1j]
MAYBE = [0, -1, 1, 1.0, 0.0, -0.0, 10**18, 2**63, 2**32, 1e-300, True, None, "", " ", "nan", (), [], (1,), [2.0]]
WORDS = ["nan", "inf", "-inf", "-1", "0", str(10**18), str(2**64), "", " ", "None", "True", "1e400", "()", "(" * 300]
WORDS += ["9" * 5000, "y" * 5000, "é\n\n\nö", "{[]: 1}", "[1, 2", "-0.0"]
# What the command line makes of a word depends on the type of the default: integer, number, switch, text, tuple, None.
ONE_OF_A_TYPE = ("seed", "optimizer.eps", "data.add_bos", "name", "release.eos_ids", "release.bos_id")
VERBS = {
    "train": (train.EXTRA, {}),
    "generate": (generate.FLAGS, {"config": False}),
    "chat": (chat.FLAGS, {"config": False}),
    "bench": (bench.EXTRA, {"workdir": False}),
    "kernels": (_bench_kernels.EXTRA, {"config": False, "workdir": False}),
    "scaling": (_scaling.EXTRA, {"workdir": False}),
    "plan": (plan.EXTRA, {"workdir": False}),
    "inspect": (inspect_verb.EXTRA, {}),
    "convert": (convert.FLAGS, {"config": False}),
    "evaluate": (evaluate.FLAGS, {"config": False}),
    "export": (export.FLAGS, {"config": False}),
    "r1": ({}, {}),
    "rl": ({}, {}),
    "bench rl": (_bench_rl.EXTRA, {"workdir": False}),
    "prepare": (prepare.FLAGS, {"workdir": False}),
    "sample": (sample.FLAGS, {}),
    "sft": (sft.EXTRA, {}),
    "supervise": (supervise.EXTRA, {"config": False}),
    "serve": (serve.FLAGS, {"config": False}),
}


def refusal(run) -> str | None:
    """The message for the user, None if all is well; anything but a UserError is a fault of ours."""
    try:
        run()
    except UserError as error:
        said = str(error)
        assert len(said.splitlines()) == 1 and len(said) < 600, said
        return said
    return None


def put(group: ConfigDict, key: str, value: object) -> bool:
    """Sets a key to a value of any type; False where ConfigDict itself refuses it, as it would in a config file."""
    try:
        with group.ignore_type():
            group[key] = value
    except OverflowError:  # an integer that no float can be
        return False
    return True


def config_of(named: str) -> ConfigDict:
    config = run_config.load(named)
    config.unlock()
    return config


def test_every_key_of_a_run_has_a_bound_that_its_default_keeps():
    defaults = run_bounds.default_values()
    assert run_bounds.BOUNDS.keys() == defaults.keys()
    outside = {key for key, bound in run_bounds.BOUNDS.items() if not bound.holds(defaults[key])}
    assert outside == {"name", "family"}  # which a config fills in


@pytest.mark.parametrize("named", [*run_config.names(), NANO])
def test_every_config_is_within_its_bounds(named):
    config = run_config.load(named)
    assert run_config.validate(config) is config


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("precision", POLICIES),
        ("family", FAMILIES),
        ("run.remat", REMAT),
        ("sharding.embed", ("", *REPLICAS)),
        ("data.format", ("auto", *FORMATS)),
        ("data.train_on", TRAIN_ON),
    ],
)
def test_the_words_of_a_bound_are_those_that_there_are(key, words):
    expected = run_bounds.BOUNDS[key].expected
    assert sorted(expected.removeprefix("one of ").replace("''", "").split(", ")) == sorted(words)


@pytest.mark.parametrize("key", run_bounds.BOUNDS)
def test_no_value_of_a_key_is_a_traceback(key):
    config = config_of("tiny_v3")
    *groups, last = key.split(".")
    group = functools.reduce(lambda node, name: node[name], groups, config)
    for value in (*NEVER, *MAYBE):
        if not put(group, last, value):
            continue
        said = refusal(lambda: run_config.validate(config))
        assert said is None or said.startswith(f"config.{key}") or "config.model" in said, said
        if any(value is one for one in NEVER):
            assert said is not None, f"config.{key}={shown(value)} was taken"


@pytest.mark.parametrize("named", MODELS)
def test_no_value_of_a_models_key_is_a_traceback(named):
    config = config_of(named)
    for key in list(config.model):
        before = config.model[key]
        for value in (*NEVER, *MAYBE):
            if not put(config.model, key, value):
                continue
            said = refusal(lambda: run_config.validate(config))
            assert said is None or said.startswith("config.model"), said
            if any(value is one for one in NEVER):
                assert said is not None, f"config.model.{key}={shown(value)} was taken"
        put(config.model, key, before)


@pytest.mark.parametrize(("named", "group"), [("tiny_v3", "yarn"), ("tiny_v1", "yarn"), ("tiny_v1", "rope_llama3")])
def test_no_value_of_a_context_extension_is_a_traceback(named, group):
    config = config_of(named)
    values = {key: True if key == "truncate" else 8 for key in GROUPS[group]}
    for key in GROUPS[group]:
        for value in (*NEVER, *MAYBE):
            put(config.model, group, ConfigDict(values | {key: value}))
            said = refusal(lambda: run_config.validate(config))
            assert said is None or said.startswith("config.model"), said
            if any(value is one for one in NEVER):
                assert said is not None, f"config.model.{group}.{key}={shown(value)} was taken"


@pytest.mark.parametrize("key", ONE_OF_A_TYPE)
def test_no_word_for_a_key_is_a_traceback(key):
    for word in WORDS:
        argv = [f"--config.{key}={word}"]
        refusal(lambda argv=argv: run_config.validate(_options.parse(argv, NANO).config))


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("loop.eval_batches=0", "a whole number from 1 to 2,000,000,000, like 8"),
        ("optimizer.beta2=2", "a number from 0 and below 1, like 0.95"),
        ("optimizer.eps=nan", "a number from 1e-30 to 1, like 1e-08"),
        ("loss.mtp_weight=-1", "a number from 0 to 1000, like 0.3"),
        ("loss.balance_rate=nan", "a number from 0 to 1, like 0.001"),
        ("seed=18446744073709551616", "a whole number from 0 to 2^64 - 1, like 0"),
        ("mesh.data=0", "a whole number from 1 to 1,000,000,000, or -1, like -1"),
        ("data.cache_dir=~nobody_of_this_name/x", "a path, with names of 255 bytes at most"),
    ],
)
def test_a_message_says_what_was_given_and_what_is_expected(word, expected):
    said = refusal(lambda: run_config.validate(_options.parse([f"--config.{word}"], "tiny_v3").config))
    assert said.startswith(f"config.{word.partition('=')[0]}=") and f"expected {expected}" in said


@pytest.mark.parametrize("verb", VERBS)
def test_every_number_that_a_verb_takes_has_a_bound(verb):
    for flag, (kind, default, _, *bounds) in VERBS[verb][0].items():
        assert bounds or kind not in (int, float), flag
        assert all(default is None or bound.holds(default) for bound in bounds), flag


@pytest.mark.parametrize("verb", VERBS)
def test_no_word_for_a_flag_is_a_traceback(verb):
    extra, takes = VERBS[verb]
    for flag, (kind, *_) in {**extra, "workdir": (Path, None)}.items():
        for word in WORDS:
            argv = [f"--{flag.replace('_', '-')}={word}"]
            said = refusal(lambda argv=argv: _options.parse(argv, extra=extra, **takes))
            if kind in (int, float) and word in ("nan", "inf", "", str(2**64), "9" * 5000):
                assert said is not None, f"--{flag}={word} was taken"


def test_every_verb_is_in_the_table():
    assert VERBS.keys() - {"kernels", "scaling", "bench rl"} == cli.verbs().keys()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("config.loop.stepz = 3", "config.loop.stepz: no such key. Did you mean config.loop.steps?"),
        ("config.lop = config.loop", "config.lop."),
        (
            "config.model.rope_bse = 1.0",
            "config.model.rope_bse: family v3 has no such key. Did you mean config.",
        ),
        ("config.model.qk_norm = True", "config.model.qk_norm: family v3 has no such key."),
        ("del config.loop.steps", "config.loop.steps: missing. Start from a config that holds a whole run"),
        ("del config['loss']", "config.loss.chunk and 10 more: missing."),
        ("config.loss.auxiliary.of_my_own = -1.0", "config.loss.auxiliary.of_my_own=-1.0: expected a number from 0"),
        ("config.model = type(config)()", "has no config.model. Start from"),
        ("config.itself = config", "the file raised RecursionError"),
        ("import sys; sys.exit(3)", "the file raised SystemExit: 3 (line 5 of "),
        ("raise ValueError('one\\ntwo\\n\\nthree')", "the file raised ValueError: one two three (line 5 of "),
        ("raise ValueError('x' * 9999)", "the file raised ValueError: xxx"),
        ("config = None", "get_config() gave a NoneType; it must return a ConfigDict."),
        ("config = config.to_dict()", "get_config() gave a dict; it must return a ConfigDict."),
    ],
)
def test_a_config_file_that_is_wrong_gets_a_line(tmp_path, capsys, line, message):
    file = tmp_path / "mine.py"
    body = f"def get_config():\n    config = tiny_v3.get_config()\n    {line}\n    return config\n"
    file.write_text(f"from deepseek_jax.configs import tiny_v3\n\n{body}")
    assert cli.main(["inspect", f"--config={file}"]) == 2
    said = capsys.readouterr().err
    assert message in said and said.count("\n") == 1, said


def test_what_a_config_file_prints_is_no_output_of_the_verb(tmp_path, capsys):
    file = tmp_path / "mine.py"
    file.write_text("import deepseek_jax.configs.tiny_v3 as t\nprint('hello')\nget_config = t.get_config\n")
    run_config.load(str(file))
    assert capsys.readouterr() == ("", "hello\n")


def test_bounds_in_words_and_values():
    assert [value for value in (-1, 0, 0.5, 1, 2, True, math.nan) if number(0, 1, above=True).holds(value)] == [0.5, 1]
    assert [value for value in (0, 1, 1.0, True, 3, 4) if whole(1, 3).holds(value)] == [1, 3]
    assert besides(whole(1, 3), 0).holds(0) and not besides(whole(1, 3), 0).holds(False)
    assert optional(text(1)).holds(None) and not optional(text(1)).holds("")
    assert several(whole(0, 9)).holds((1, 2)) and not several(whole(0, 9)).holds("12")
    assert path().holds("") and path(1).holds(Path("a")) and not path().holds("a" * 256) and not name().holds("a/b")
    assert whole(0, 2**32 - 1).expected == "a whole number from 0 to 2^32 - 1"
    assert shown(10**5000) == "<int: ValueError>" and in_line("a\n b") == "a b" and len(shown("x" * 999)) == 80


def test_base_is_no_run():
    assert "has no config.model" in refusal(lambda: run_config.validate(run_config.load("base")))
    assert importlib.import_module("deepseek_jax.configs.base").get_config().model == ConfigDict()

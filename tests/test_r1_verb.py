"""The chain of R1: its stages as data, what it remembers of each, and that a kill changes nothing."""

import hashlib
import json
from pathlib import Path

import pytest

from deepseek_jax import run_config
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _chain, _provenance, _reinforcement, _sampling, r1
from deepseek_jax.launch._stages import R1, RECORD, Record, Stage, configs_of
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import Rewards
from deepseek_jax.rl.turns import Turns
from deepseek_jax.run import trainer
from deepseek_jax.saved_config import to_json

GOLDEN = Path(__file__).parent / "golden"


@pytest.fixture
def config():
    return run_config.load("tiny_r1")


def test_a_stage_is_made_from_earlier_ones_and_has_their_network(config):
    configs = configs_of(config)
    for n, stage in enumerate(R1):
        earlier = {one.name: one for one in R1[:n]}
        assert {stage.weights, stage.data} - {""} <= earlier.keys()
        assert not stage.data or earlier[stage.data].kind == "sample"
        if stage.weights:
            assert configs[stage.name].model == configs[stage.weights].model
    assert configs["student"].model.d_model == 24 and configs["sft"].model.d_model == 64
    assert configs["second"].rl.temperature == 0.7 and configs["first"].rl.temperature == 1.0
    assert not any(len(one.r1) for one in configs.values())


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("r1.third", {"loop": {"steps": 1}}, r"config.r1.third: no such stage. Expected some of base, cold, first"),
        ("r1.first.loop", {"stpes": 1}, r"config.r1.first: config.loop.stpes: no such key. Did you mean config.loop.s"),
        ("r1.first.loop", {"steps": 0}, r"config.loop.steps=0: expected"),
        ("run.init_from", "runs/a", r"config.run.init_from: each base has its own. Set config.r1.base.run.init_from"),
    ],
)
def test_a_change_that_no_stage_can_make_is_refused(config, path, value, message):
    *groups, last = path.split(".")
    node = config.unlock()
    for name in groups:
        node = node[name]
    node[last] = value
    with pytest.raises(UserError, match=message):
        configs_of(config)


STAGE = Stage("sft", "sft", "fine-tuning", weights="base", data="kept")
SOURCES = {"weights": {"step": 3, "manifest": "ab"}, "data": {"sha256": "cd"}}


def test_a_record_says_what_a_stage_was_made_from_and_refuses_anything_else(config, tmp_path):
    config = configs_of(config)["sft"]
    (tmp_path / "sft").mkdir()
    (tmp_path / "sft" / "stage.json.partial").write_text("{")  # killed before the first record was whole
    begun = Record(tmp_path / "sft", STAGE, config, SOURCES)
    assert begun.made is None
    again = Record(tmp_path / "sft", STAGE, config, SOURCES)
    again.write(made={"step": 60})
    done = Record(tmp_path / "sft", STAGE, config, SOURCES)
    done.check({"step": 60})
    with pytest.raises(UserError, match=r"does not hold what its stage made: .*60.* was there, now it is .*61"):
        done.check({"step": 61})
    other = SOURCES | {"data": {"sha256": "ce"}}
    with pytest.raises(UserError, match=r"was made from other data than there are now. Remove that folder, and those"):
        Record(tmp_path / "sft", STAGE, config, other)
    with config.unlocked():
        config.mesh.data = config.rl.rows_at_once = config.rl.verifiers = 1  # where and how fast it runs
        Record(tmp_path / "sft", STAGE, config, SOURCES)
        config.loop.steps = 121
    with pytest.raises(UserError, match=r"was made with another config.loop.steps: 120 -> 121. Remove that folder"):
        Record(tmp_path / "sft", STAGE, config, SOURCES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    with pytest.raises(UserError, match=r"is not empty, and holds no stage.json: no stage made it"):
        Record(tmp_path / "mine", STAGE, config, SOURCES)


class Killed(Exception):
    """In place of SIGKILL."""


def pretend(monkeypatch, moments=()):
    """Stages that write a file made from those that they read; raises `Killed` at some moments. Returns what ran."""
    ran, left = [], list(moments)

    def moment(what):
        ran.append(what)
        if what in left:
            left.remove(what)
            raise Killed(what)

    def make(place):
        moment(f"{place.stage.name} begins")
        read = [place.of(name).folder / "made" for name in (place.stage.weights, place.stage.data) if name]
        text = place.stage.name + "".join(file.read_text() for file in read)
        (place.folder / "made").write_text(hashlib.sha256(text.encode()).hexdigest())
        moment(f"{place.stage.name} ends")
        return 0

    class Judge:
        def __init__(self, *_):
            pass

        def figures(self, config, origin):
            moment(f"{Path(origin).name} is judged")
            return dict.fromkeys(_chain.COLUMNS, float(len(origin)))

    monkeypatch.setattr(_chain, "KINDS", dict.fromkeys(_chain.KINDS, make))
    monkeypatch.setattr(_chain, "Judge", Judge)
    monkeypatch.setattr(_chain, "mark_of", lambda place: _provenance.file_mark(place.folder / "made"))
    monkeypatch.setattr(_chain, "is_complete", lambda place: (place.folder / "made").exists())
    return ran


def records(workdir):
    return {stage.name: json.loads((workdir / stage.name / RECORD).read_bytes()) for stage in R1}


@pytest.mark.slow
def test_a_chain_that_is_killed_at_any_moment_of_its_bookkeeping_ends_as_an_undisturbed_one(
    monkeypatch, tmp_path, capsys
):
    whole, cut = tmp_path / "a", tmp_path / "b"
    every = pretend(monkeypatch)
    assert r1.main([f"--workdir={whole}"]) == 0
    assert len(every) == 3 * len(R1) - 1
    pretend(monkeypatch, every)
    for _ in every:
        with pytest.raises(Killed):
            r1.main([f"--workdir={cut}"])
    for expected in (["student_zero is judged"], []):
        ran = pretend(monkeypatch)
        assert r1.main([f"--workdir={cut}"]) == 0 and ran == expected
    assert records(whole) == records(cut)
    table = capsys.readouterr().out.splitlines()[-len(R1) - 1 :]
    assert (
        table[-1].startswith("student_zero") and table[-2].startswith("student ") and "student_base + kept" in table[-2]
    )


def test_a_stage_that_was_made_anew_makes_those_after_it_refuse(monkeypatch, tmp_path):
    pretend(monkeypatch)
    words = [f"--workdir={tmp_path}"]
    assert r1.main(words) == 0
    (tmp_path / "cold" / "made").write_text("another")
    with pytest.raises(UserError, match=r"cold does not hold what its stage made"):
        r1.main(words)
    record = tmp_path / "cold" / RECORD
    record.write_text(json.dumps(json.loads(record.read_text()) | {"made": None}))
    monkeypatch.setitem(_chain.KINDS, "sft", lambda place: 0)  # leaves the other one there
    with pytest.raises(UserError, match=r"first was made from other weights than there are now"):
        r1.main(words)
    monkeypatch.setattr(_chain, "is_complete", lambda place: False)
    record.write_text(json.dumps(json.loads(record.read_text()) | {"made": None}))
    assert r1.main(words) == 0, "stopped on request in the first stage that is not done"
    assert json.loads(record.read_text())["made"] is None


def test_a_chain_refuses_problems_and_worked_answers_that_have_changed(monkeypatch, tmp_path):
    pretend(monkeypatch)
    rows = [json.dumps({"prompt": f"{n}", "answer": f"{n}"}) for n in range(20)]
    mine, worked = tmp_path / "mine.jsonl", tmp_path / "worked.jsonl"
    mine.write_text("\n".join(rows))
    worked.write_text("{}")
    words = [f"--workdir={tmp_path}/a", f"--config.rl.problems={mine}", f"--config.r1.cold.data.source={worked}"]
    assert r1.main(words) == 0
    worked.write_text("[]")
    with pytest.raises(UserError, match=r"cold was made from other data than there are now"):
        r1.main(words)
    mine.write_text("\n".join(rows[1:]))
    with pytest.raises(UserError, match=r"base was made from other problems than there are now"):
        r1.main(words)


def test_a_stage_is_asked_in_its_own_format_whatever_was_judged_before(config):
    """Of a stage only its network and how it reads text matter; what belongs to training is off."""
    with config.unlocked():
        config.rl.keep_routing, config.r1.sft.ema = True, {"decay": 0.9}
        config.r1.cold.loss.balance_rate = 0.5
        config.r1.second.precision, config.r1.first.data = "bf16", {"chat_template": "v3"}
    configs, judge = configs_of(config), _chain.Judge(config, None)
    asked = {name: judge.asking(one, one) for name, one in configs.items()}
    for one in asked.values():
        _reinforcement.check_sizes(one)
    assert to_json(asked["base"]) == to_json(asked["cold"]) == to_json(asked["sft"])
    assert asked["second"].precision == "bf16" and asked["first"].data.chat_template == "v3"
    assert asked["student"].model == configs["student"].model != asked["base"].model


def test_the_published_recipe_suits_weights_of_any_family():
    """Each stage builds its trainer, and a prompt of some length fits."""
    config = run_config.load("r1_stages")
    config.r1.base.run.init_from, config.r1.student_base.run.init_from = map(
        str, (GOLDEN / "v3_mtp", GOLDEN / "r1_qwen")
    )
    configs, mesh = configs_of(config), make_mesh(data=1)
    assert configs["second"].family == "v3" and configs["student_zero"].family == "v1"
    judge = _chain.Judge(config, None)
    for stage in R1:
        own = configs[stage.name]
        asked = judge.asking(own, own)
        for one in (asked, own) if stage.kind == "rl" else (asked,):
            _reinforcement.check_sizes(one)
            _reinforcement.check_rows(one, n_devices=8)
        _sampling.check(own)
        if stage.kind == "sft" or stage.name == "first":
            trainer(own, mesh)
        if not stage.weights:
            trainer(asked, mesh)
    rl = config.rl
    turns = Turns(open_tokenizer("bytes"), config.data.chat_template, rl.thinking, rl.longest_prompt, rl.longest_answer)
    assert len(turns.prompt(Problem(({"role": "user", "content": "x" * 500},), "1", "exact"), "it")) > 500
    assert rl.longest_answer <= config.data.seq_len


def test_the_tiny_recipes_are_prepared():
    """Their programs are described, and their problems suit prompts and rewards; nothing is compiled."""
    configs = {name: one for name, one in configs_of(run_config.load("tiny_r1")).items() if name == "student_zero"}
    for name, own in (configs | {"tiny_zero": run_config.load("tiny_zero")}).items():
        with Rewards(_reinforcement.used(own.rl.rewards), own.rl.verifiers, own.rl.verify_s) as rewards:
            learner = _reinforcement.prepare(own, rewards)
        assert learner.sizes.n_rows == 128 and learner.trainer.abstract, name
        assert len(learner.turns.prompt(learner.problems.training(0), "")) <= own.rl.longest_prompt


def test_a_base_without_weights_and_built_in_problems_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"Name a run or published weights: --config.r1.base.run.init_from=DIR"):
        r1.main(["--config=tiny_r1", f"--config.rl.problems={problems_in(tmp_path)}", f"--workdir={tmp_path}/a"])


def problems_in(folder):
    (folder / "mine.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}", "answer": "1"}) for n in range(9)))
    return folder / "mine.jsonl"


def test_a_chain_of_other_stages_finds_them(config, tmp_path):
    stages = (Stage("mine", "base", ""), Stage("next", "sft", "", weights="mine"))
    assert _chain.Place(stages[1], {}, tmp_path, "", stages).of("mine").folder == tmp_path / "mine"


def test_reinforcement_learning_resumes_with_the_same_adapters_only(config, tmp_path):
    saved = {"config": to_json(config), "problems": "a"}
    _reinforcement.check_same_run(config, "a", saved, tmp_path)
    del saved["config"]["lora"]  # of a run before there were adapters
    _reinforcement.check_same_run(config, "a", saved, tmp_path)
    config.lora.alpha = 32.0
    with pytest.raises(UserError, match=r"holds a run of other settings: config.lora.alpha: 16.0 -> 32.0"):
        _reinforcement.check_same_run(config, "a", saved, tmp_path)

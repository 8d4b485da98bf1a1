"""The chain of R1: its stages as data, what it remembers of each, and that a kill changes nothing."""

import hashlib
import json
from pathlib import Path

import pytest

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _chain, _provenance, r1
from deepseek_jax.launch._stages import R1, RECORD, Record, Stage, configs_of


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
        config.mesh.data = 1  # where it runs does not matter
        Record(tmp_path / "sft", STAGE, config, SOURCES)
        config.loop.steps = 61
    with pytest.raises(UserError, match=r"was made with another config.loop.steps: 60 -> 61. Remove that folder"):
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

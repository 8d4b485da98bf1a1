"""A shard is a function of the plan and its number: whoever makes it, however often it is killed."""

import gzip
import importlib.util
import json
import signal
import subprocess
import sys

import numpy as np
import pytest
from array_record.python import array_record_module

from deepseek_jax import cli, files
from deepseek_jax.data.fim import n_chosen
from deepseek_jax.data.prepared import shards as module
from deepseek_jax.data.prepared.beam import make_shards_on_beam
from deepseek_jax.data.prepared.plan import SIDES, file_name, make_plan
from deepseek_jax.data.prepared.records import from_record, read_record
from deepseek_jax.data.prepared.sections import Line
from deepseek_jax.data.prepared.shards import fim_share, make_shard, pack
from deepseek_jax.data.tokenizer import open_tokenizer
from deepseek_jax.data.watch import unwatched
from deepseek_jax.errors import UserError

BYTES = open_tokenizer("bytes")


class Killed(BaseException):
    pass


def test_the_records_of_a_shard_are_the_windows_of_its_packing(prepare):
    plan, n_padded = prepare(), 0
    with unwatched("", 0) as counter:
        for shard in range(plan.n_shards):
            marker = plan.marker(shard)
            for name, side in zip(SIDES, pack(plan, shard, BYTES, counter), strict=True):
                assert marker[name]["windows"] == (side.n_samples if side.n_documents else 0)
                for n in range(marker[name]["windows"]):
                    path, size = plan.folder / file_name(name, shard), marker[name]["bytes"]
                    found = from_record(read_record(path, n, size, ""), 33, np.dtype(np.uint16))
                    for got, expected in zip(found, side.window(shard, n), strict=True):
                        np.testing.assert_array_equal(got, expected)
                    n_padded += int((found.numbers == 0).any())
    assert n_padded  # the last held-out windows


def test_any_number_of_workers_make_the_same_shards(prepare, contents, tmp_path):
    alone = contents(prepare("alone").folder)
    assert len([name for name in alone if name.startswith("train-")]) == 5
    for share in range(3):  # three hosts, the last of which completes it
        plan = prepare("hosts", numbers=range(2 - share, 5, 3))
        assert plan.finish() is None or share == 2
    assert contents(tmp_path / "hosts") == alone
    assert contents(prepare("processes", n_workers=2).folder) == alone


def test_killed_at_any_write_and_started_again(prepare, contents, tmp_path, monkeypatch):
    alone = contents(prepare("alone", 1).folder)
    calls = {"n": 0}

    def fatal(function, at: int):
        def call(*args, **kwargs):
            calls["n"] += 1
            if calls["n"] == at:
                raise Killed
            return function(*args, **kwargs)

        return call

    n_kills = 0
    for at in range(1, 100):
        calls["n"] = 0
        with monkeypatch.context() as patch:
            for where, name in ((module, "write_records"), (files, "write_atomically"), (files, "flush_folder")):
                patch.setattr(where, name, fatal(getattr(where, name), at))
            patch.setattr(module.os, "fsync", fatal(module.os.fsync, at))
            patch.setattr(module.os, "replace", fatal(module.os.replace, at))
            try:
                prepare(f"killed{at}", 1)
                break
            except Killed:
                n_kills += 1
        assert contents(prepare(f"killed{at}", 1).folder).items() >= alone.items()
    assert n_kills > 8


def test_a_killed_process_leaves_complete_shards_only(prepare, contents, tmp_path, settings):
    alone = contents(prepare("alone").folder)
    script = (
        "import sys, time\nfrom pathlib import Path\n"
        "from deepseek_jax.data.prepared.plan import make_plan\n"
        "from deepseek_jax.data.prepared import shards\n"
        "from deepseek_jax.data.tokenizer import open_tokenizer\n"
        "from deepseek_jax.data.watch import unwatched\n"
        f"opened, settings = open_tokenizer('bytes'), {settings!r}\n"
        f"plan = make_plan(Path({str(tmp_path / 'killed')!r}), opened, 5, **settings)\n"
        "plan.begin()\nwrite = shards.write_records\n"
        "def stops(path, records):\n    found = write(path, records)\n"
        "    if list(plan.folder.glob('shard-*.json')):\n        print('here', flush=True)\n        time.sleep(600)\n"
        "    return found\n"
        "shards.write_records = stops\n"
        "with unwatched('', 0) as counter:\n"
        "    for number in range(5):\n        shards.make_shard(plan, number, opened, counter)\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "here\n"  # one shard is complete, another is being made
        process.send_signal(signal.SIGKILL)
    assert list((tmp_path / "killed" / "partial").iterdir())
    assert contents(prepare("killed").folder) == alone
    assert not list((tmp_path / "killed" / "partial").iterdir())  # cleared


def test_a_shard_that_is_damaged_is_made_again(prepare, contents):
    plan = prepare()
    before = contents(plan.folder)
    (plan.folder / "train-00002.array_record").write_bytes(b"")
    (plan.folder / "shard-00003.json").write_bytes(b"{")
    assert plan.finish() is None
    assert contents(prepare().folder) == before


def test_files_that_are_not_divided_give_the_same_shards_when_it_continues(prepare, contents, tmp_path, settings):
    rng = np.random.default_rng(1)
    for number, size in enumerate((9, 1, 1, 1, 14, 2, 1, 7, 1, 3)):
        words = "".join(map(chr, rng.integers(97, 123, 100 * size)))
        (tmp_path / f"{number}.jsonl.gz").write_bytes(gzip.compress(f'{{"text": "{words}"}}\n'.encode(), mtime=0))
    change = {"source": str(tmp_path / "*.gz"), "holdout_rate": 0.0, "fim_rate": 0.0}
    alone = prepare("alone", 7, **change)
    assert alone.n_shards < 7 and alone.cuts != tuple(Line(alone.corpus).cuts(alone.n_shards))
    before = contents(alone.folder)
    for n_shards in (0, 7):
        (alone.folder / "shard-00001.json").unlink()
        again = prepare("alone", n_shards, **change)
        assert again.cuts == alone.cuts and again.key == alone.key and contents(again.folder) == before
    with pytest.raises(UserError, match=f"shards_asked: 7 -> {alone.n_shards}; .*where shards begin"):
        prepare("alone", alone.n_shards, **change)


def test_small_shards_have_their_share_of_fill_in_the_middle(prepare):
    plan = prepare("small", 40, numbers=[], holdout_rate=0.0)  # a document or two each, of which a quarter is none
    with unwatched("", 0) as counter:
        found = [pack(plan, number, BYTES, counter)[0] for number in range(plan.n_shards)]
    counts = [n_chosen(side.n_documents, side.fim_rate) for side in found]
    assert plan.n_shards > 20 and 5 < sum(counts) < 15
    assert [fim_share(plan, 3, n) * n for n in (0, 4, 400)] == [0, 1, 100]


def test_a_writer_that_fails_is_named_with_its_file(prepare, tmp_path, monkeypatch):
    class Full:
        def __init__(self, *of):
            pass

        def write(self, record):
            pass

        def close(self):
            raise RuntimeError("Failed to write: No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(array_record_module, "ArrayRecordWriter", Full)
        with pytest.raises(UserError, match=r"train-00000.array_record cannot be written \(Failed .*No space left"):
            prepare()
    assert prepare().finish()


def test_what_dead_processes_left_is_cleared_once(prepare, monkeypatch):
    calls = []
    monkeypatch.setattr(module, "clear", calls.append)
    assert prepare().n_shards == 5 and len(calls) == 1


def test_other_settings_are_refused(prepare, tmp_path, settings):
    prepare()
    for change, named in (
        ({"seq_len": 64}, "data.seq_len: 32 -> 64"),
        ({"fim_rate": 0.5}, "data.fim_rate: 0.25 -> 0.5"),
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"n_shards": 4}, "shards: 5 -> 4"),
    ):
        with pytest.raises(UserError, match=f"holds shards of other settings: .*{named}"):
            prepare(**change)
    assert prepare(n_shards=0).n_shards == 5  # as there
    (tmp_path / "99.txt").write_text("one more")
    with pytest.raises(UserError, match="files: 40 -> 41; .*names or sizes of files"):
        prepare()


def test_what_cannot_be_prepared(prepare, tmp_path, settings):
    plan = prepare()
    with pytest.raises(UserError, match="is prepared already"):
        make_plan(tmp_path / "x", BYTES, **{**settings, "source": str(plan.folder)})
    with pytest.raises(UserError, match="training tokens in 5 shards, and a window takes 100001"):
        prepare("long", seq_len=100_000)
    with pytest.raises(UserError, match="none of the .* documents is held out"):
        prepare("few", holdout_rate=1e-9)
    (tmp_path / "talk.jsonl").write_text('{"messages": [{"role": "user", "content": "a"}]}\n')
    with pytest.raises(UserError, match="holds conversations, which are not prepared"):
        make_plan(tmp_path / "x", BYTES, **{**settings, "source": str(tmp_path / "talk.jsonl")})
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(UserError, match="its 1 files are empty"):
        make_plan(tmp_path / "x", BYTES, **{**settings, "source": str(tmp_path / "empty.txt")})


def test_an_error_in_a_worker_process_names_the_row(prepare, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n' * 50 + "{nonsense\n" + '{"text": "a"}\n' * 50)
    with pytest.raises(UserError, match="the line at byte 700 is not JSON"):
        prepare(source=str(tmp_path / "rows.jsonl"), n_shards=2, n_workers=2)


def test_copies_of_a_document_are_on_one_side(prepare, tmp_path):
    text = (tmp_path / "00.txt").read_text()
    for number in range(41, 60):
        (tmp_path / f"{number}.txt").write_text(text)
    plan = prepare(n_shards=8)
    counts = [sum(plan.marker(n)[side]["documents"] for n in range(plan.n_shards)) for side in SIDES]
    assert sum(counts) == 59
    rates = [plan.settings["holdout_rate"], 1 - plan.settings["holdout_rate"]]
    assert min(abs(counts[1] - 40 * rate - extra) for rate in rates[:1] for extra in (0, 19)) < 8


def test_the_verb(tmp_path, settings, capsys):
    words = ["prepare", f"--to={tmp_path / 'tokens'}", f"--config.data.source={settings['source']}", "--shards=4"]
    words += ["--config.data.seq_len=32", "--workers=1", "--config.data.holdout_rate=0.2"]
    assert cli.main([*words, "--worker=1/2"]) == 0
    assert "2 of 4 shards; missing: 0, 2" in capsys.readouterr().out
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    assert "2 shards from" in out and "MB per CPU second" in out and "4 shards, 40 documents" in out
    keys = "--config.data.seq_len=32 --config.data.holdout_rate=0.2"
    assert f"deepseek-jax train {keys} --config.data.source={tmp_path / 'tokens'}" in out
    assert "fill-in-the-middle: off" in out and "held out to evaluate on: 20% of the documents" in out
    assert cli.main([*words, "--worker=2/2"]) == 2
    assert "expected I/N with I below N" in capsys.readouterr().err
    assert cli.main([*words[:1], f"--to={tmp_path / 'fim'}", *words[2:], "--config.data.fim_rate=0.5"]) == 0
    assert "fill-in-the-middle: 50% of the documents" in capsys.readouterr().out
    assert json.loads((tmp_path / "fim" / "prepared-plan.json").read_bytes())["fim_rate"] == 0.5
    given = ["train", f"--config.data.source={tmp_path / 'fim'}", f"--workdir={tmp_path / 'run'}"]
    for key, value, found in (("fim_rate", "0.1", 0.5), ("holdout_rate", "0.1", 0.2), ("add_bos", "False", True)):
        assert cli.main([*given, f"--config.data.{key}={value}"]) == 2
        assert f"config.data.{key}={value}: data.source = " in (err := capsys.readouterr().err)
        assert f"was prepared with {found}. Leave the key out" in err


@pytest.mark.skipif(importlib.util.find_spec("apache_beam") is not None, reason="Beam is installed")
def test_beam_is_named_where_it_is_missing(prepare):
    with pytest.raises(UserError, match="pip install deepseek_jax apache-beam"):
        make_shards_on_beam(prepare(), [0], [])


def test_making_a_shard_counts_the_bytes_of_its_files(prepare):
    class Counter:
        n_bytes = 0

        def advance(self, n_bytes: int) -> None:
            self.n_bytes += n_bytes

    plan = prepare(numbers=[])
    for _ in range(2):
        counter = Counter()
        for number in range(plan.n_shards):
            make_shard(plan, number, BYTES, counter)
        assert counter.n_bytes == plan.cuts[-1]

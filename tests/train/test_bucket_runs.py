"""A run whose workdir is in a bucket: the same as one on a disk, stopped and resumed on another machine as well."""

import itertools
import os
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import cli, storage
from deepseek_jax.convert.hf import open_published
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _training
from deepseek_jax.parallel.peers import Peers
from deepseek_jax.train import mirror
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.checkpoint.manifest import committed_steps
from deepseek_jax.train.metrics import read_log
from deepseek_jax.train.mirror import Mirror, mirrored
from deepseek_jax.train.phases import Phases
from deepseek_jax.train.watchdog import Limits, Watchdog
from deepseek_jax.weights import open_weights
from tests import buckets

CONFIG = str(Path(__file__).parent / "nano_v3.py")


@pytest.fixture
def bucket(tmp_path, monkeypatch):
    """gs:// on this disk."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return buckets.on_disk(tmp_path / "buckets", monkeypatch)


def test_files_of_a_run_go_to_the_bucket_and_come_back(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(mirror, "UPLOAD_S", 0.05)
    told: list[str] = []
    place = storage.place("gs://b/runs/a")
    with mirrored(place, told.append) as folder:
        (folder / "tensorboard").mkdir()
        (folder / "tensorboard/events").write_bytes(b"1")
        (folder / "metrics.jsonl").write_bytes(b"one\n")
        (folder / "x.partial").write_bytes(b"")
    store = storage.open_store(place)
    store.write("checkpoints/step", b"large")
    assert store.names() == ["checkpoints/step", "metrics.jsonl", "tensorboard/events"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    with mirrored(place, told.append) as folder:
        assert (folder / "metrics.jsonl").read_bytes() == b"one\n" and not (folder / "checkpoints").exists()
        with (folder / "metrics.jsonl").open("ab") as log:
            log.write(b"two\n")
    assert store.read("metrics.jsonl") == b"one\ntwo\n" and told == []
    with mirrored(tmp_path, told.append) as folder:
        assert folder == tmp_path


def test_a_bucket_that_refuses_is_told_once(bucket, tmp_path, monkeypatch):
    told: list[str] = []
    (tmp_path / "log").write_bytes(b"1")
    copying = Mirror(storage.open_store("gs://b/a"), tmp_path, told.append)
    with monkeypatch.context() as patch:
        patch.setattr(storage.Store, "write", lambda *_: (_ for _ in ()).throw(storage.StorageError("gs://b/a: no.")))
        copying.copy()
        copying.copy()
    assert told == ["files of the run could not be copied: gs://b/a: no.. Training continues."]
    copying.close()
    assert storage.open_store("gs://b/a").read("log") == b"1"


def refusing(number: int):
    """A way to read of stores whose answers from the `number`th on do not come."""
    calls, read = itertools.count(1), storage.Store.read

    def call(store, name, *part):
        if next(calls) >= number:
            raise storage.StorageError(f"{store}/{name}: no.")
        return read(store, name, *part)

    return call


def test_what_was_not_fetched_is_not_replaced(bucket, tmp_path):
    store, told = storage.open_store("gs://b/a"), []
    for name in ("goodput.jsonl", "metrics.jsonl", "tensorboard/events"):
        store.write(name, b"long\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.Store, "read", refusing(2))
        copying = Mirror(store, tmp_path / "half", told.append)
    for name in ("goodput.jsonl", "metrics.jsonl", "new"):
        with (tmp_path / "half" / name).open("ab") as file:
            file.write(b"line\n")
    copying.close()
    assert store.read("goodput.jsonl") == b"long\nline\n" and store.read("new") == b"line\n"
    assert store.read("metrics.jsonl") == store.read("tensorboard/events") == b"long\n"
    assert len(told) == 1 and "could not be fetched: gs://b/a/metrics.jsonl: no." in told[0]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage.Store, "names_before", lambda *_: (_ for _ in ()).throw(storage.StorageError("no.")))
        copying = Mirror(store, tmp_path / "nothing", told.append)
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/metrics.jsonl").write_bytes(b"line\n")
    copying.close()
    assert store.read("metrics.jsonl") == b"long\n" and len(told) == 2


def test_lines_that_were_not_uploaded_stay(bucket, tmp_path):
    store, folder = storage.open_store("gs://b/a"), tmp_path / "run"
    folder.mkdir()
    for name, content in (("ahead", b"1"), ("behind", b"1234"), ("other", b"9")):
        store.write(name, content)
        (folder / name).write_bytes(b"12")
    Mirror(store, folder, print).close()
    assert {name: store.read(name) for name in store.names()} == {"ahead": b"12", "behind": b"1234", "other": b"9"}
    assert (folder / "behind").read_bytes() == b"1234" and (folder / "other").read_bytes() == b"9"


def test_shards_are_not_listed_and_a_process_asks_for_its_own(bucket, tmp_path, monkeypatch):
    store, asked, names = storage.open_store("gs://b/a"), [], storage.Store.names
    mine = ["hosts/process_1.stacks", "profiles/process_1/x"]
    others = ["hosts/process_0.jsonl", "hosts/process_10.stacks", "metrics.jsonl", "1/x"]
    for name in [*mine, *others, "checkpoints/shards/x", "base/checkpoints/shards/x", "base/checkpoints/step_1/COMMIT"]:
        store.write(name, b"")
    monkeypatch.setattr(storage.Store, "names", lambda store, prefix="": asked.append(prefix) or names(store, prefix))
    Mirror(store, tmp_path / "1", print, process=1).close()
    assert asked == ["hosts/process_1.", "profiles/process_1/"]
    assert sorted(p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*") if p.is_file()) == mine
    Mirror(store, tmp_path / "0", print).close()
    assert not any("checkpoints/".startswith(prefix) for prefix in asked)
    assert (tmp_path / "0/metrics.jsonl").exists() and (tmp_path / "0/1/x").exists()
    assert not list((tmp_path / "0").rglob("checkpoints"))  # nor those of a base inside the workdir


def test_a_file_that_the_bucket_has_not_is_not_that_of_a_deleted_run(bucket):
    place = storage.place("gs://b/a")
    storage.open_store(place).write("goodput.jsonl", b"one")
    found = mirror.fetched(place, "goodput.jsonl")
    assert found is not None and found.read_bytes() == b"one"
    storage.open_store(place).delete("goodput.jsonl")
    assert mirror.fetched(place, "goodput.jsonl") is None and found.exists()


def test_files_are_uploaded_at_each_checkpoint_and_stacks_before_the_process_leaves(bucket, tmp_path, monkeypatch):
    place = storage.place("gs://b/a")
    store, phases = storage.open_store(place), Phases()
    with mirrored(place, print) as folder, Peers(lambda: "") as peers:
        upload = partial(mirror.upload, place)
        with Checkpointer(place / "checkpoints", committed=upload) as checkpoints:
            (folder / "metrics.jsonl").write_bytes(b"1")
            checkpoints.save(1, {"x": jax.device_put(np.float32(1))})
            assert checkpoints.wait() and store.read("metrics.jsonl") == b"1"
        with Watchdog(Limits(True, 0, 0, 0), phases, None, peers, folder, upload):
            peers.record("stuck")
            assert b"stuck" in store.read("hosts/process_0.stacks")
    mirror.upload(place)  # of a run that is over: nothing


def test_a_silent_bucket_is_said_in_the_advice(bucket, monkeypatch):
    monkeypatch.setattr(storage.Store, "names", lambda *_: (_ for _ in ()).throw(storage.StorageError("no.")))
    said = "The bucket does not answer, so the newest checkpoint in gs://b/a/checkpoints is not known."
    assert _training.advice(storage.place("gs://b/a"), "go") == f"{said} Start again with: go"


def test_a_second_start_on_the_machine_touches_nothing(bucket, tmp_path, monkeypatch):
    place = storage.place("gs://b/a")
    with mirrored(place, print) as folder:
        (folder / "metrics.jsonl").write_bytes(b"one\n")
        storage.open_store(place).write("metrics.jsonl", b"older")
        with pytest.raises(UserError, match="gs://b/a is being written by another run .pid"), mirrored(place, print):
            pass
        assert (folder / "metrics.jsonl").read_bytes() == b"one\n"
    with mirrored(place, print):
        pass
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(UserError, match="cannot be written there .Not a directory.. Set XDG_CACHE_HOME"):
        mirrored(place, print).__enter__()


def train(workdir: str, steps: int, text: Path) -> int:
    words = [f"--config={CONFIG}", f"--workdir={workdir}", "--no-sample", f"--config.data.source={text}"]
    words += [f"--config.loop.steps={steps}", "--config.loop.log_every=1", "--config.checkpoint.every=2"]
    words += [
        "--config.model.mtp_depth=0",
        "--config.model.n_dense_layers=0",
        "--config.loop.eval_every=0",
        "--config.mesh.data=1",
    ]
    return cli.main(["train", *words, f"--config.data.cache_dir={text.parent}/tokens"])


def figures(path: Path) -> list[dict]:
    """What is recorded of training steps, without the clock."""
    records = [record for record in read_log(path) if record["split"] == "train"]
    return [{key: value for key, value in record.items() if key != "speed"} for record in records]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> tuple[Path, list[dict]]:
    """A text, and what a run on it records."""
    folder = tmp_path_factory.mktemp("undisturbed")
    text = folder / "text.txt"
    text.write_text("def main(argv): return 3 * len(argv)\n" * 400)
    assert train(str(folder / "run"), 5, text) == 0
    return text, figures(folder / "run" / "metrics.jsonl")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["disk", *buckets.PROGRAMS])
def test_a_run_in_a_bucket_resumes_to_the_undisturbed_losses(name, undisturbed, bucket, tmp_path, monkeypatch, capsys):
    text, known = undisturbed
    if name != "disk":
        monkeypatch.undo()
        for variable, value in buckets.variables(name).items():
            monkeypatch.setenv(variable, value)
    where = "gs://b/run" if name == "disk" else buckets.new_place(name, tmp_path)
    for steps, machine in ((3, "one"), (5, "two")):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / machine))
        assert train(where, steps, text) == 0
    assert " in 2 starts: " in capsys.readouterr().out
    assert committed_steps(storage.place(where) / "checkpoints")[-1] == 5
    assert open_weights(storage.place(where)).config.name == "nano_v3"
    (tmp_path / "log").write_bytes(storage.open_store(where).read("metrics.jsonl"))
    found = figures(tmp_path / "log")
    assert [record["step"] for record in found] == [1, 2, 3, 4, 5]
    assert found == known
    assert not [found for found in os.listdir(".") if ":" in found]


@pytest.mark.matrix
@pytest.mark.timeout(1800)
def test_verbs_take_a_run_in_a_bucket_as_one_on_a_disk(bucket, tmp_path, capsys):
    """The same text, the same export, an account of its time, and a beginning for another run."""
    text = tmp_path / "text.txt"
    text.write_text("def main(argv): return 3 * len(argv)\n" * 400)
    runs = "gs://b/run", str(tmp_path / "run")
    assert [train(run, 2, text) for run in runs] == [0, 0]
    capsys.readouterr()

    def said(*words: str) -> str:
        assert cli.main([*words]) == 0
        return capsys.readouterr().out

    first, second = (said("generate", f"--workdir={run}", "--prompt=def", "--max-tokens=4") for run in runs)
    assert first == second and first.startswith("def")
    targets = storage.place("gs://b/exported"), tmp_path / "exported"
    for run, target in zip(runs, targets, strict=True):
        said("export", f"--workdir={run}", f"--to={target}")
    sent, written = (open_published(target).tensors for target in targets)
    assert sent.names() == written.names()
    assert all(sent.read(name).tobytes() == written.read(name).tobytes() for name in sent.names())
    assert "time of this run" in said("inspect", f"--workdir={runs[0]}")
    assert open_weights("gs://b/exported").config.model == open_weights(targets[1]).config.model
    words = ("train", "--workdir=gs://b/next", "--config.run.init_from=gs://b/run", "--config.loop.steps=1")
    words += (f"--config.data.source={text}", "--no-sample", f"--config.data.cache_dir={tmp_path}/tokens")
    words += ("--config.data.seq_len=32", "--config.batch.size=8", "--config.batch.size_start=8")
    assert "weights of gs://b/run" in said(*words, "--config.mesh.data=1", "--config.loop.eval_every=0")

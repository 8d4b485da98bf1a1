"""Prepared text in a bucket: the same shards, made and continued by several hosts, and the same batches from them."""

import errno
import pickle

import numpy as np
import pytest

from deepseek_jax import cli, files, storage
from deepseek_jax.data.pipeline import open_splits
from deepseek_jax.data.prepared import folder, records
from deepseek_jax.data.prepared.source import Source, sources
from deepseek_jax.errors import LocalError, UserError
from deepseek_jax.storage import Store
from tests import buckets

WHERE = storage.place("gs://b/tokens")


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    records._opened.cache_clear()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return buckets.on_disk(tmp_path / "buckets", monkeypatch)


def objects() -> dict[str, bytes]:
    store = storage.open_store(WHERE)
    return {name: store.read(name) for name in store.names()}


def test_what_a_store_refuses_comes_out_of_a_worker_process_as_it_is():
    refused = storage.StorageError("gs://b/x: no.", 13)
    again = pickle.loads(pickle.dumps(refused))
    assert (str(again), again.errno) == (str(refused), refused.errno)


def test_hosts_make_the_shards_of_one_and_a_killed_one_continues(prepare, contents, monkeypatch):
    alone, write = contents(prepare("alone").folder), Store.write
    for host in range(2):  # each is killed before some write, and starts again
        for at in (1, 2, 3):
            calls = iter(range(at))
            with monkeypatch.context() as patch, pytest.raises(StopIteration):
                patch.setattr(Store, "write", lambda *words, calls=calls: next(calls) is None or write(*words))
                prepare(WHERE, numbers=range(host, 5, 2))
        plan = prepare(WHERE, numbers=range(host, 5, 2))
        assert (plan.finish() is None) == (host == 0)
    assert objects() == alone
    with pytest.raises(UserError, match="gs://b/tokens holds shards of other settings: data.seq_len"):
        prepare(WHERE, seq_len=16)


def test_batches_are_those_of_the_same_text_on_a_disk(prepare, settings, tmp_path):
    on_disk = prepare("alone").folder
    prepare(WHERE)
    assert sources(f"{WHERE}@0.5,{on_disk}") == [Source(WHERE, 0.5), Source(on_disk, 1.0)]
    splits = [open_splits(**{**settings, "source": str(source)}) for source in (WHERE, on_disk)]
    for remote, here in zip(*splits, strict=True):
        assert remote.fingerprint() == here.fingerprint()
        for a, b in zip(remote.rows(0, 8), here.rows(0, 8), strict=True):
            np.testing.assert_array_equal(a, b)
    kept = list(folder.here(WHERE).rglob("*.array_record"))
    assert kept  # shards are fetched once
    for change in (lambda content: b"cut", lambda content: bytes(len(content))):
        for path in kept:
            path.write_bytes(change(path.read_bytes()))
        records._opened.cache_clear()
        np.testing.assert_array_equal(splits[0][0].rows(0, 8).ids_BT, splits[1][0].rows(0, 8).ids_BT)


def test_another_text_in_the_same_place_is_fetched(tmp_path):
    where, store = WHERE / "train-00000.array_record", storage.open_store(WHERE)
    found = []
    for text in (b"one", b"two"):
        store.write(where.name, text)
        found.append(folder.fetched(where, 3, text.hex()).read_bytes())
    assert found == [b"one", b"two"]


def test_a_bucket_that_does_not_answer_and_a_full_disk_say_nothing_of_the_shard(prepare, settings, monkeypatch):
    """A start after a while may do better (75), unless there is something to correct (2); the marker stays."""
    prepare(WHERE)
    split = open_splits(**{**settings, "source": str(WHERE)})[0]

    def raising(error: OSError):
        def refused(*words, **more):
            raise error

        return refused

    refusals = [
        (Store, "read", storage.StorageError("gs://b: the service cannot be reached."), 75),
        (Store, "read", storage.StorageError("gs://b: no right to do so.", errno.EACCES), 2),
        (files, "write_atomically", OSError(errno.ENOSPC, "No space left on device"), 2),
    ]
    for owner, name, error, code in refusals:
        with monkeypatch.context() as patch, pytest.raises(LocalError) as told:
            patch.setattr(owner, name, raising(error))
            split.rows(0, 1)
        assert told.value.exit_code == code and "Remove" not in str(told.value)
    assert str(folder.here(WHERE)) in str(told.value) and "XDG_CACHE_HOME" in str(told.value)


def test_the_verb_and_what_is_missing(prepare, settings, tmp_path, capsys):
    text = prepare("alone").corpus.source
    words = ["--config=tiny_v3", f"--config.data.source={text}", "--config.data.tokenizer=bytes"]
    words += ["--config.data.seq_len=32", "--config.data.holdout_rate=0.2", "--shards=3", "--workers=1"]
    assert cli.main(["prepare", f"--to={WHERE}", "--worker=0/2", *words]) == 0
    assert "gs://b/tokens: 2 of 3 shards; missing: 1" in capsys.readouterr().out
    with pytest.raises(UserError, match="gs://b/tokens is not completely prepared: 2 of 3 shards"):
        open_splits(**{**settings, "source": str(WHERE)})
    assert cli.main(["prepare", f"--to={WHERE}", *words]) == 0
    assert "--config.data.source=gs://b/tokens" in capsys.readouterr().out
    assert cli.main(["train", "--config.data.source=gs://b/raw"]) == 2
    assert "this one cannot be in gs://" in capsys.readouterr().err

"""Faults of buckets and of processes: who hears what, which exit code, what stays; buckets are folders here."""

import errno
import json
import time

import jax
import numpy as np
import pytest

from deepseek_jax import storage
from deepseek_jax.errors import PassingError, UserError
from deepseek_jax.storage import StorageError, Store
from deepseek_jax.train.checkpoint import checkpointer, votes, writer
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.checkpoint.votes import Ballot
from tests import buckets

WHERE = storage.place("gs://b/checkpoints")
STATE = {"w": jax.device_put(np.arange(4, dtype=np.float32))}
KINDS = [(errno.EIO, 75), (errno.EACCES, 2), (errno.ENOENT, 2)]


@pytest.fixture(autouse=True)
def bucket(tmp_path, monkeypatch):
    for name, seconds in (("RENEW_S", 0.02), ("DEAD_S", 3.0), ("LOOK_S", 0.01)):
        monkeypatch.setattr(writer, name, seconds)
    return buckets.on_disk(tmp_path, monkeypatch)


def refusing(number: int):
    def call(*_):
        raise StorageError("gs://b/checkpoints: no.", number)

    return call


@pytest.mark.parametrize(("number", "code"), KINDS)
def test_a_silent_bucket_ends_a_run_for_now_and_a_refusal_for_good(number, code, monkeypatch):
    with Checkpointer(WHERE) as checkpoints:
        checkpoints.save(1, STATE)
    calls = [lambda: Checkpointer(WHERE)]
    reader = Checkpointer(WHERE, read_only=True)
    calls += [reader.latest, reader.read_meta, lambda: reader.restore(STATE), storage.open_store(WHERE).check]
    for name in ("read", "generation", "names"):
        monkeypatch.setattr(Store, name, refusing(number))
    for call in calls:
        with pytest.raises(UserError, match="gs://b/checkpoints: no") as told:
            call()
        assert told.value.exit_code == code and isinstance(told.value, PassingError) == (code == 75)


@pytest.mark.parametrize(("number", "code"), KINDS)
def test_a_shard_that_cannot_be_read_is_no_damage(number, code, monkeypatch):
    with Checkpointer(WHERE) as checkpoints:
        checkpoints.save(1, STATE)
    read = Store.read
    monkeypatch.setattr(
        Store, "read", lambda store, name, *part: (refusing(number) if "shards/" in name else read)(store, name, *part)
    )
    with pytest.raises(UserError) as told:
        Checkpointer(WHERE, read_only=True).restore(STATE)
    assert told.value.exit_code == code


def test_a_step_that_cannot_be_judged_is_not_deleted(monkeypatch):
    told: list[str] = []
    with Checkpointer(WHERE, warn=told.append) as checkpoints:
        checkpoints.save(1, STATE)
        assert checkpoints.wait()
        monkeypatch.setattr(checkpointer.files, "verify", refusing(errno.EIO))
        checkpoints.save(1, STATE)
        assert not checkpoints.wait() and checkpoints.steps() == [1] and "step 1 was NOT saved" in told[0]


def test_no_collective_begins_before_the_lease_is_decided(monkeypatch):
    order = []
    monkeypatch.setattr(checkpointer, "sole_writer", lambda store: order.append("lease"))
    monkeypatch.setattr(checkpointer, "_agree", lambda value: order.append("collective") or value)
    monkeypatch.setattr(Ballot, "decide", lambda *_: order.append("vote") or "")
    Checkpointer(WHERE)
    assert order[:3] == ["lease", "vote", "collective"]
    monkeypatch.setattr(Ballot, "decide", lambda *_: "process 1 has not finished")
    with pytest.raises(PassingError, match="did not all come to open gs://b/checkpoints: process 1"):
        Checkpointer(WHERE)


def test_a_renewal_whose_answer_was_lost_is_our_own(monkeypatch):
    exchange, lost = Store.exchange, []

    def losing(store, *words):
        done = exchange(store, *words)
        if len(lost) < 3:
            lost.append(words)
            raise StorageError("the answer is lost")
        return done

    store = storage.open_store(WHERE)
    lease = writer.Lease(store)
    monkeypatch.setattr(Store, "exchange", losing)
    end = time.monotonic() + 30
    while int(store.read(writer.LEASE).split()[-1]) < 8 and lease.is_held() and time.monotonic() < end:
        time.sleep(0.01)
    assert len(lost) == 3 and lease._generation is not None and lease._thread.is_alive()
    lease.release()
    assert store.names() == []


class Words(dict):
    """The store of two processes, of which process 1 has voted; `broken` keys cannot be set once."""

    def __init__(self, vote: dict, broken: tuple[str, ...] = ()):
        super().__init__({votes._key(1): json.dumps(vote)})
        self.broken = {*broken}

    def set(self, key: str, text: str) -> None:
        if key in self.broken:
            self.broken.remove(key)
            raise ValueError("cannot be set")
        self[key] = text


@pytest.mark.parametrize(
    ("vote", "broken", "expected"),
    [
        ({"topic": "t", "failure": "", "content": "x"}, (), ""),
        ({"topic": "t", "failure": ""}, (), "KeyError"),
        ({"topic": "t", "failure": "", "content": "x"}, (votes._key(0),), "cannot be set"),
    ],
)
def test_whatever_fails_in_process_0_the_others_hear_of_it(vote, broken, expected):
    ballot, heard = Ballot(1.0), []
    ballot.count, ballot._store = 2, Words(vote, broken)
    verdict = ballot.decide("t", "", "0", heard.extend)
    assert expected in verdict and bool(verdict) == bool(expected) and heard == ([] if expected else ["0", "x"])
    assert json.loads(ballot._store[votes.VERDICT]) == {"topic": "t", "failure": verdict}

"""Copies of checkpoints on the host's own disk: read where they are whole, never needed, and no more than two steps."""

from pathlib import Path

import jax
import numpy as np
import pytest

from deepseek_jax import storage
from deepseek_jax.storage import Store
from deepseek_jax.train.checkpoint import shards, tier
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from tests import buckets

WHERE = storage.place("gs://b/checkpoints")


@pytest.fixture(autouse=True)
def read(tmp_path, monkeypatch) -> list[str]:
    """A bucket on this disk; the names of the shards that are read from it."""
    buckets.on_disk(tmp_path / "buckets", monkeypatch)
    names, ask = [], Store.read

    def reading(store, name, *part):
        if "shards/" in name and not name.endswith(".json"):
            names.append(name)
        return ask(store, name, *part)

    monkeypatch.setattr(Store, "read", reading)
    return names


def state(step: int) -> dict:
    return {"w": jax.device_put(np.arange(8, dtype=np.float32) + step), "b": jax.device_put(np.float32(step))}


def saved(folder, *steps: int) -> list[str]:
    told: list[str] = []
    with Checkpointer(WHERE, local=folder, warn=told.append) as checkpoints:
        for step in steps:
            checkpoints.save(step, state(step))
            assert checkpoints.wait()
    return told


def restored(folder) -> int:
    """The step that comes back, bit for bit."""
    with Checkpointer(WHERE, local=folder, read_only=True) as checkpoints:
        step, found, _ = checkpoints.restore(state(0))
    assert all(np.array_equal(found[name], value) for name, value in state(step).items())
    return step


def files(folder) -> list:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def test_what_is_here_is_not_asked_of_the_bucket(tmp_path, read):
    folder = tmp_path / "ssd"
    saved(folder, 1, 2, 3)
    assert {path.parent.parent.name for path in files(folder)} == {"step_00000002", "step_00000003"}
    assert restored(folder) == 3 and read == []
    assert restored(tmp_path / "another host") == 3 and len(read) > 0


@pytest.mark.parametrize("damage", ["flipped", "cut", "gone", "older"])
def test_what_is_damaged_here_comes_from_the_bucket(tmp_path, read, damage):
    folder = tmp_path / "ssd"
    saved(folder, 1, 2)
    here = [path for path in files(folder) if "step_00000002" in path.parts]
    other = next(path for path in files(folder) if "step_00000001" in path.parts)
    for path in here:
        content = path.read_bytes()
        changed = {"flipped": bytes([content[0] ^ 1]) + content[1:], "cut": content[:-1], "older": other.read_bytes()}
        path.unlink() if damage == "gone" else path.write_bytes(changed[damage])
    assert restored(folder) == 2 and len(read) == len(here)


@pytest.mark.parametrize("error", [PermissionError, FileNotFoundError])
def test_what_is_damaged_and_cannot_be_deleted_comes_from_the_bucket(tmp_path, read, monkeypatch, error):
    """A disk that was mounted to be read only, or another process of the host that has deleted the file first."""
    folder = tmp_path / "ssd"
    saved(folder, 1, 2)
    here = [path for path in files(folder) if "step_00000002" in path.parts]
    for path in here:
        path.write_bytes(b"damaged")

    def refused(*words, **more):
        raise error(13, "no")

    monkeypatch.setattr(Path, "unlink", refused)
    assert restored(folder) == 2 and len(read) == len(here)


def test_two_processes_of_a_host_share_a_folder_with_a_damaged_copy(tmp_path):
    folder = tmp_path / "ssd"
    both = [tier.Tier(storage.open_store(WHERE), folder, print) for _ in range(2)]
    both[0].write("shards/step_00000001/a/0", b"whole")
    shard = shards.Shard("shards/step_00000001/a/0", 5, shards.sha256(b"whole"), ())
    files(folder)[0].write_bytes(b"other")
    found = [one.read(shard.name) for one in both]  # both read before either deletes
    assert found == [b"other"] * 2 and [one.again(shard.name) for one in both] == [b"whole"] * 2
    assert [shards.fetch(one, shard) for one in both] == [b"whole"] * 2


def test_the_step_just_saved_stays_and_those_of_the_path_that_was_left_go(tmp_path, read):
    folder = tmp_path / "ssd"
    saved(folder, 1, 6, 7)
    with Checkpointer(WHERE, local=folder) as checkpoints:
        checkpoints.restore(state(0), step=1)
        checkpoints.save(2, state(2))
        assert checkpoints.wait()
    assert {path.parent.parent.name for path in files(folder)} == {"step_00000002"}
    read.clear()
    assert restored(folder) == 2 and read == []


def test_a_step_that_only_this_host_has_is_not_taken(tmp_path, read):
    folder = tmp_path / "ssd"
    saved(folder, 1, 2)
    storage.open_store(WHERE).delete("step_00000002/COMMIT")
    assert restored(folder) == 1 and read == []


def test_a_disk_that_cannot_be_written_stops_nothing(tmp_path, read):
    (tmp_path / "ssd").write_bytes(b"a file")
    told = saved(tmp_path / "ssd", 1, 2)
    assert [text for text in told if "Training continues, and checkpoints are in gs://b/checkpoints alone" in text]
    assert len(told) == 1 and restored(tmp_path / "ssd") == 2 and tier.KEPT == 2

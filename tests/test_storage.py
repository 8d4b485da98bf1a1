"""Laws of stores: the same in folders and in buckets. `tests/buckets.py` says which services are found and used."""

import errno
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from deepseek_jax import storage
from deepseek_jax.errors import PassingError, UserError
from deepseek_jax.storage import ABSENT, Remote, StorageError, open_store, place, refusal
from tests import buckets


@pytest.fixture(params=buckets.FOUND)
def store(request, tmp_path):
    with buckets.fresh(request.param, tmp_path) as where:
        yield open_store(where)


@pytest.fixture(params=buckets.CONDITIONAL)
def conditional(request, tmp_path):
    with buckets.fresh(request.param, tmp_path) as where:
        yield open_store(where)


def test_what_is_written_is_read_listed_and_deleted(store):
    assert store.names() == [] and store.generation("a/b") == ABSENT
    written = {"a/b": b"1", "a/c/d": bytes(range(256)) * 5000, "a0": b"", "ü x/%+?": b"2"}
    for name, content in written.items():
        store.write(name, b"before")
        store.write(name, content)
    assert {name: store.read(name) for name in store.names()} == written
    assert store.names("a/") == ["a/b", "a/c/d"] and store.below("a").names() == ["b", "c/d"]
    assert store.read("a/c/d", 255, 258) == b"\xff\x00\x01"
    store.delete_below("a/")
    store.delete("ü x/%+?")
    store.delete("never/was")
    assert store.names() == ["a0"]
    with pytest.raises(FileNotFoundError):
        store.read("a/b")


def test_one_of_many_writers_is_first(conditional):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda n: conditional.write_if_absent("x/COMMIT", b"%d" % n), range(8)))
    assert won.count(True) == 1
    first = won.index(True)
    assert conditional.read("x/COMMIT") == b"%d" % first
    assert conditional.write_if_absent("x/COMMIT", b"%d" % first)  # as if the first answer had been lost
    assert not conditional.write_if_absent("x/COMMIT", b"other")


def test_an_object_changes_hands_once(conditional):
    conditional.write("lease", b"a")
    seen = conditional.generation("lease")
    new = conditional.exchange("lease", b"b", seen)
    assert new == conditional.generation("lease") != seen
    assert conditional.exchange("lease", b"c", seen) is None and conditional.read("lease") == b"b"
    assert conditional.exchange("lease", None, seen) is None and conditional.names() == ["lease"]
    assert conditional.exchange("lease", None, new) is not None and conditional.names() == []


def test_an_empty_folder_goes_with_its_last_object(tmp_path):
    store = open_store(tmp_path)
    store.write("a/b/c", b"")
    store.write("a/d", b"")
    store.delete_below("a/b/")
    assert os.listdir(tmp_path / "a") == ["d"]


@pytest.mark.parametrize("name", ["weed", "moto"])
def test_a_missing_bucket_is_told_in_one_line(name, tmp_path):
    if name not in buckets.PROGRAMS:
        pytest.skip(f"{name} was not found: DEEPSEEK_JAX_STORES names the folder of such programs")
    with (
        buckets.fresh(name, tmp_path),
        pytest.raises(UserError, match=r"^s3://nowhere/x/.*there is no bucket nowhere. Make it") as told,
    ):
        open_store("s3://nowhere/x").check()
    assert "\n" not in str(told.value) and told.value.exit_code == 2


def test_a_service_that_does_not_answer_is_told_in_one_line(monkeypatch):
    monkeypatch.setattr(storage, "RETRIES", {"max_retries": 1, "initial_delay": "1ms", "max_delay": "1ms"})
    storage._context.cache_clear()
    for name, value in (buckets.SECRETS | {"AWS_ENDPOINT_URL": "http://127.0.0.1:1"}).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(PassingError, match="s3://bucket/x.*cannot be reached.*check the network") as told:
        open_store("s3://bucket/x").check()
    assert "\n" not in str(told.value)
    storage._context.cache_clear()


@pytest.mark.parametrize(
    ("where", "answer", "said", "number"),
    [
        ("s3://b/x", "NOT_FOUND: NoSuchBucket: [x='y\nz']", "there is no bucket b. Make it", errno.ENOENT),
        ("s3://b/x", "INTERNAL: Failed to get credentials", "no right .*Set AWS_ACCESS_KEY_ID", errno.EACCES),
        ("gs://b/x", "PERMISSION_DENIED: 403", "no right .*Run gcloud auth application-default", errno.EACCES),
        ("gs://b/x", "NOT_FOUND: HTTP 404", "there is no bucket b, or it hides", errno.ENOENT),
        ("gs://b/x", "ABORTED: All 3 retry attempts failed", "cannot be reached or refuses", errno.EIO),
        ("/b/x", "RESOURCE_EXHAUSTED: No space left on device", "No space left", errno.ENOSPC),
    ],
)
def test_refusals_say_what_to_do(where, answer, said, number):
    with (
        pytest.raises(StorageError, match=f"^{where}/k: could not read: .*{said}") as told,
        open_store(where)._asking("read", "k"),
    ):
        raise ValueError(answer)
    assert told.value.errno == number and "\n" not in str(told.value)
    assert refusal(told.value).exit_code == (75 if number == errno.EIO else 2)  # another start may help, or not


def test_a_disk_that_refuses_is_told_in_one_line(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StorageError, match="file/x: could not write: .*Not a directory.$"):
        open_store(tmp_path / "file").write("x", b"")


def test_places_join_as_paths_do():
    there = place("gs:/bucket//runs/a/")  # as pathlib leaves it
    assert there == Remote("gs://bucket/runs/a") and str(there / "b") == "gs://bucket/runs/a/b"
    assert (there.name, there.parent) == ("a", Remote("gs://bucket/runs"))
    assert Remote("s3://bucket").parent == Remote("s3://bucket") and place(there) is there
    assert place("runs/a") == Path("runs/a") and place("C:/models") == Path("C:/models")
    for nothing in ("gs://", "s3:///"):
        with pytest.raises(UserError, match=r"no bucket is named. Give .{2}://BUCKET/FOLDER"):
            place(nothing)
    with pytest.raises(TypeError):
        open(there)

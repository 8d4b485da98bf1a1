"""Every byte counts, and a large file that has not changed is not read again."""

import os

import pytest

from deepseek_jax.data import fingerprints
from deepseek_jax.data.fingerprints import fingerprint
from deepseek_jax.errors import UserError


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A file that counts as large and as changed long ago, and a folder for the cache."""
    monkeypatch.setattr(fingerprints, "REMEMBERED_BYTES", 100)
    monkeypatch.setattr(fingerprints, "SETTLED_S", -1.0)
    path = tmp_path / "a.txt"
    path.write_bytes(bytes(range(256)) * 16)
    return path, tmp_path / "known"


def flip(path, place: int) -> None:
    with open(path, "r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1]))


def test_every_byte_counts_though_size_and_time_stay(large):
    path, known = large
    first = fingerprint(path, known)
    times = os.stat(path).st_atime_ns, os.stat(path).st_mtime_ns
    for place in (0, 1, 1777, 4095):
        flip(path, place)
        os.utime(path, ns=times)  # as after a copy that preserves times
        assert fingerprint(path, known) != first
        flip(path, place)
    os.utime(path, ns=times)
    assert fingerprint(path, known) == first == fingerprint(path)


def test_an_unchanged_file_is_not_read_again(large, monkeypatch):
    path, known = large
    first = fingerprint(path, known)
    monkeypatch.setattr(fingerprints.hashlib, "file_digest", None)
    assert fingerprint(path, known) == first


@pytest.mark.parametrize("damage", ["flip", "cut", "empty"])
def test_a_damaged_memory_is_not_believed(large, damage):
    path, known = large
    first = fingerprint(path, known)
    (memo,) = (known / "fingerprints").iterdir()
    text = memo.read_text()
    at = text.index(first)
    other = "0" if first[0] != "0" else "1"
    memo.write_text({"flip": text[:at] + other + text[at + 1 :], "cut": text[: at + 3], "empty": ""}[damage])
    assert fingerprint(path, known) == first


def test_what_changed_just_now_is_not_remembered(large, monkeypatch):
    path, known = large
    monkeypatch.setattr(fingerprints, "SETTLED_S", 3600.0)
    fingerprint(path, known)
    assert not known.exists()


def test_no_folder_to_remember_in_is_no_obstacle(large):
    path, known = large
    known.write_text("a file")
    assert fingerprint(path, known) == fingerprint(path)


def test_a_file_that_grows_as_it_is_read_is_refused(large, monkeypatch):
    path, known = large
    digest = fingerprints.hashlib.file_digest

    def growing(file, make):
        found = digest(file, make)
        with open(path, "ab") as more:
            more.write(b"more")
        return found

    monkeypatch.setattr(fingerprints.hashlib, "file_digest", growing)
    with pytest.raises(UserError, match="changes while it is read"):
        fingerprint(path, known)

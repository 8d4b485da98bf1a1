"""The cache: it returns what was tokenised, damage is noticed, and a run works without it."""

import pickle
import threading

import numpy as np
import pytest

from deepseek_jax.data import store as store_module
from deepseek_jax.data import tokenise
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.store import cache_folder, open_store
from deepseek_jax.data.tokenizer import ByteTokenizer
from deepseek_jax.errors import UserError


@pytest.fixture
def corpus(tmp_path):
    for i in range(5):
        (tmp_path / f"{i}.txt").write_text("é" * i + "x" * (3 * i + 1))
    return open_corpus(str(tmp_path / "*.txt"), "text")


def same(a, b):
    return all(np.array_equal(a.document(i), b.document(i)) for i in range(len(a))) and np.array_equal(
        a.hashes, b.hashes
    )


def entry(cache):
    (folder,) = cache.iterdir()  # one entry and no left-over temporary folder
    return folder


def test_hit_equals_fresh_and_reads_no_text(corpus, tmp_path, monkeypatch):
    fresh = open_store(corpus, ByteTokenizer(), str(tmp_path / "cache"))
    assert [bytes(np.asarray(fresh.document(i)).astype(np.uint8)).decode() for i in range(5)] == list(
        corpus.documents()
    )
    assert fresh.n_bytes.tolist() == [1, 6, 11, 16, 21]
    monkeypatch.setattr(store_module, "tokenise", None)
    hit = open_store(corpus, ByteTokenizer(), str(tmp_path / "cache"))
    assert same(fresh, hit)
    assert same(fresh, pickle.loads(pickle.dumps(hit)))
    assert len(pickle.dumps(hit)) < 1000  # by its folder, not its contents


def test_small_chunks_change_nothing(corpus, tmp_path, monkeypatch):
    whole = open_store(corpus, ByteTokenizer(), str(tmp_path / "a"))
    monkeypatch.setattr(tokenise, "CHUNK_CHARACTERS", 3)
    assert same(whole, open_store(corpus, ByteTokenizer(), str(tmp_path / "b")))


def test_changed_text_or_tokenizer_is_another_entry(corpus, tmp_path):
    cache = tmp_path / "cache"
    open_store(corpus, ByteTokenizer(), str(cache))
    corpus.files[0].write_text("changed")
    changed = open_store(corpus, ByteTokenizer(), str(cache))
    assert len(changed.document(0)) == len("changed")
    other = ByteTokenizer()
    other.fingerprint = "other"
    open_store(corpus, other, str(cache))
    assert len(list(cache.iterdir())) == 3


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "meta"])
def test_damage_is_noticed_and_the_entry_built_again(corpus, tmp_path, damage):
    cache = tmp_path / "cache"
    fresh = open_store(corpus, ByteTokenizer(), str(cache))
    victim = entry(cache) / ("meta.json" if damage == "meta" else "tokens.uint16")
    data = bytearray(victim.read_bytes())
    data[7] ^= 1
    victim.unlink()  # not written in place: `fresh` has it mapped
    if damage != "remove":
        victim.write_bytes({"flip": data, "truncate": data[:-2], "meta": b"[]"}[damage])
    with pytest.warns(UserWarning, match="is damaged and is rebuilt"):
        assert same(fresh, open_store(corpus, ByteTokenizer(), str(cache)))
    entry(cache)
    assert same(fresh, open_store(corpus, ByteTokenizer(), str(cache)))


def test_unwritable_cache_falls_back_to_memory(corpus, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="tokenised in memory"):
        memory = open_store(corpus, ByteTokenizer(), str(tmp_path / "file" / "cache"))
    assert same(memory, open_store(corpus, ByteTokenizer(), str(tmp_path / "cache")))
    assert same(memory, pickle.loads(pickle.dumps(memory)))


def test_builders_at_once_agree(corpus, tmp_path):
    stores = []
    build = lambda: stores.append(open_store(corpus, ByteTokenizer(), str(tmp_path / "cache")))  # noqa: E731
    threads = [threading.Thread(target=build) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(same(stores[0], one) for one in stores[1:])
    assert len(stores) == 4
    entry(tmp_path / "cache")


def test_a_failed_build_leaves_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "x"}\nbad\n')
    with pytest.raises(UserError, match="line 2"):
        open_store(open_corpus(str(tmp_path / "a.jsonl"), "text"), ByteTokenizer(), str(tmp_path / "cache"))
    assert not list((tmp_path / "cache").iterdir())
    (tmp_path / "b.txt").write_text("")
    with pytest.raises(UserError, match=r"holds no text: b\.txt is empty"):
        open_store(open_corpus(str(tmp_path / "b.txt"), "text"), ByteTokenizer(), str(tmp_path / "cache"))


def test_default_folder(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder("") == tmp_path / "deepseek_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder("") == tmp_path / ".cache" / "deepseek_jax"
    assert cache_folder("~/x") == tmp_path / "x"

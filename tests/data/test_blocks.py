"""A sealed file: the first read of a changed bit or a truncated end reports it."""

import os
import pickle
import random
import threading

import numpy as np
import pytest

from deepseek_jax.data import blocks as blocks_module
from deepseek_jax.data import store as store_module
from deepseek_jax.data.blocks import Blocks, DamagedFile, Numbers, hashes_of, seal
from deepseek_jax.data.corpus import open_corpus
from deepseek_jax.data.store import open_store
from deepseek_jax.data.tokenizer import ByteTokenizer

BLOCK = 64


@pytest.fixture
def sealed(tmp_path, monkeypatch):
    """A file of 1,000 numbers in blocks of 64 bytes, and its seal."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", BLOCK)
    path = tmp_path / "tokens.uint16"
    np.arange(1000, dtype=np.uint16).tofile(path)
    return path, seal(path)


def flip(path, place: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1 << bit
    path.write_bytes(content)  # in place: a process that has the file open sees it


def test_slices_of_slices_are_those_of_the_array(sealed):
    whole, numbers = np.arange(1000, dtype=np.uint16), Numbers(Blocks(*sealed), "uint16")
    choose = random.Random(0)
    for _ in range(200):
        a, b, c, d = (choose.randint(-5, 1005) for _ in range(4))
        np.testing.assert_array_equal(np.asarray(numbers[a:b][c:d]), whole[a:b][c:d])
        assert len(numbers[a:b][c:d]) == len(whole[a:b][c:d])
    np.testing.assert_array_equal(np.concatenate([numbers[:3], numbers[990:]]), [0, 1, 2, *range(990, 1000)])
    assert np.asarray(numbers[:2], np.int32).dtype == np.int32


def test_each_flipped_bit_is_met_by_the_read_that_touches_it_and_by_no_other(sealed):
    path, sealing = sealed
    choose = random.Random(1)
    for _ in range(100):
        place, bit = choose.randrange(2000), choose.randrange(8)
        flip(path, place, bit)
        blocks, damaged = Blocks(path, sealing), place // BLOCK
        for block in range(-(-2000 // BLOCK)):
            start, stop = block * BLOCK, min((block + 1) * BLOCK, 2000)
            if block != damaged:
                blocks.read(start, stop)
                continue
            with pytest.raises(DamagedFile, match=f"tokens.uint16: bytes {start:,} to {stop:,} have changed"):
                blocks.read(start + 1, start + 2)
        flip(path, place, bit)


def test_a_file_cut_while_it_is_open_is_an_error_in_words(sealed):
    path, sealing = sealed
    blocks = Blocks(path, sealing)
    blocks.check()  # all blocks are known to be good
    os.truncate(path, 700)
    assert blocks.read(0, 700)
    with pytest.raises(DamagedFile, match="ends at byte 700, expected 2,000"):
        blocks.read(600, 800)
    with pytest.raises(DamagedFile, match="has 700 bytes, expected 2,000"):
        Blocks(path, sealing)


@pytest.mark.parametrize("size", [0, 1, BLOCK - 1, BLOCK, BLOCK + 1])
def test_any_size(tmp_path, monkeypatch, size):
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", BLOCK)
    path = tmp_path / "bytes.uint8"
    path.write_bytes(bytes(range(size)))
    assert Blocks(path, seal(path)).read(0, size) == bytes(range(size))


def test_damaged_hashes_are_noticed_at_once(sealed):
    path, sealing = sealed
    flip(hashes_of(path), 17)
    with pytest.raises(DamagedFile, match="hashes has changed"):
        Blocks(path, sealing)


def test_threads_read_at_once(sealed):
    numbers, wrong = Numbers(Blocks(*sealed), "uint16"), []

    def read(seed: int) -> None:
        choose = random.Random(seed)
        for _ in range(200):
            start = choose.randrange(990)
            if not np.array_equal(np.asarray(numbers[start : start + 10]), np.arange(start, start + 10)):
                wrong.append(start)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.fixture
def large(tmp_path, monkeypatch):
    """A cache whose token file is too large to be read at the start, and the folder of its entry."""
    monkeypatch.setattr(blocks_module, "BLOCK_BYTES", BLOCK)
    monkeypatch.setattr(store_module, "WHOLE_FILE_BYTES", 0)
    for i in range(20):
        (tmp_path / f"{i}.txt").write_text(f"document {i} " * 20)
    corpus = open_corpus(str(tmp_path / "*.txt"), "text")

    def open_again():
        return open_store(corpus, ByteTokenizer(), str(tmp_path / "cache"))

    open_again()
    (folder,) = (tmp_path / "cache").glob("tokens-*")
    return open_again, folder


def test_a_bit_flipped_in_the_middle_of_a_large_cache_ends_the_run_and_the_next_start_builds_it_again(large):
    """No damage is silent: no token is wrong, in this process or in a reader process."""
    open_again, folder = large
    right = [np.asarray(open_again().document(i)).tolist() for i in range(20)]
    flip(folder / "tokens.uint16", 1001)
    for store in (open_again(), pickle.loads(pickle.dumps(open_again()))):
        with pytest.raises(DamagedFile, match="tokens.uint16: bytes 960 to 1,024 have changed .* Start again"):
            for i in range(20):
                assert np.asarray(store.document(i)).tolist() == right[i]
        with pytest.warns(UserWarning, match="is damaged and is rebuilt"):
            store = open_again()
        assert [np.asarray(store.document(i)).tolist() for i in range(20)] == right
        flip(folder / "tokens.uint16", 1001)

"""Training from shards: a batch is a function of its number, and what does not fit is refused."""

import json
import pickle
import tracemalloc

import numpy as np
import pytest

from deepseek_jax.data.pipeline import open_splits, settled
from deepseek_jax.data.prepared import records
from deepseek_jax.data.prepared.mixture import PERIOD, Shares
from deepseek_jax.data.prepared.plan import VERSION
from deepseek_jax.data.prepared.reading import PreparedSide
from deepseek_jax.data.prepared.source import MANIFEST, sources
from deepseek_jax.errors import UserError


@pytest.fixture
def opened(prepare, settings):
    """Returns both sides of what is prepared in `tmp_path/name`."""

    def open_it(name: str = "tokens", **change):
        records._opened.cache_clear()
        source = str(prepare(name).folder)
        return open_splits(**{**settings, "source": source, **change})

    return open_it


def assert_equal(a, b):
    for x, y in zip(a, b, strict=True):
        np.testing.assert_array_equal(x, y)


def pieces(batch) -> set[bytes]:
    return {row[i : i + 16].tobytes() for row in batch.ids_BT for i in range(17) if row[i : i + 16].max() < 256}


def test_rows_of_all_processes_are_the_batch(opened):
    split, start, count = opened()[0], 1000, 16
    whole = split.rows(start, count)
    for n_processes in (1, 2, 4):
        share = count // n_processes
        parts = [split.rows(start + p * share, share) for p in range(n_processes)]
        assert_equal(whole, map(np.concatenate, zip(*parts, strict=True)))
    assert_equal(whole, pickle.loads(pickle.dumps(split._samples)).rows(start, count))  # as a reader process has it
    assert_equal(whole, next(split.batches([(start, count)])))


def test_an_epoch_is_every_window_once_and_epochs_differ(opened):
    split, _ = opened()
    epochs = [split.rows(e * split.n_samples, split.n_samples).ids_BT for e in range(2)]
    assert sorted(map(bytes, epochs[0])) == sorted(map(bytes, epochs[1]))
    assert len(set(map(bytes, epochs[0]))) == split.n_samples
    assert not np.array_equal(*epochs)
    other, _ = opened(seed=99)
    assert not np.array_equal(epochs[0], other.rows(0, split.n_samples).ids_BT)


def test_held_out_text_is_never_trained_on_and_has_a_fixed_order(opened):
    training, held_out = opened()
    of_training, of_held_out = (pieces(split.rows(0, split.n_samples)) for split in (training, held_out))
    assert of_training and of_held_out and not of_training & of_held_out
    assert_equal(held_out.rows(0, 4), opened(seed=99)[1].rows(0, 4))
    batch = held_out.rows(0, held_out.n_samples)
    assert (batch.segments_BT == 0).any() and (batch.targets_BT[batch.segments_BT == 0] == -1).all()
    assert held_out.n_documents + training.n_documents == 40


def test_documents_may_be_masked_when_they_are_read(opened):
    plain, masked = (opened(mask_documents=mask)[0].rows(0, 32) for mask in (False, True))
    np.testing.assert_array_equal(plain.ids_BT, masked.ids_BT)
    assert plain.segments_BT.max() == 1 and masked.segments_BT.max() > 1
    ends = masked.ids_BT == 257
    assert (masked.positions_BT[:, 1:][ends[:, :-1]] == 0).all() and (masked.targets_BT[ends] == -1).all()


def test_what_was_decided_when_it_was_prepared(opened, prepare, settings):
    source = str(prepare().folder)
    found = settled({**settings, "source": source, "fim_rate": 0.0})
    assert found == dict(format="text", fim_rate=0.25, holdout_rate=0.2, add_bos=True, special_tokens=False)
    with pytest.raises(UserError, match="prepared in windows of 32 tokens, and data.seq_len = 64"):
        opened(seq_len=64)
    with pytest.raises(UserError, match="is prepared text, not conversations"):
        opened(format="conversations")

    class Other:
        vocab_size, fingerprint = 272, "other"

    with pytest.raises(UserError, match="prepared with another tokenizer than data.tokenizer"):
        opened(tokenizer=Other())


def test_what_is_half_prepared_says_how_much_is_missing(prepare, settings):
    plan = prepare(numbers=[0, 3])
    with pytest.raises(UserError, match="not completely prepared: 2 of 5 shards are there"):
        open_splits(**{**settings, "source": str(plan.folder)})
    (prepare().folder / MANIFEST).write_text("{")
    with pytest.raises(UserError, match="is damaged. Remove it, and repeat"):
        open_splits(**{**settings, "source": str(plan.folder)})


def test_a_changed_byte_is_found_and_never_trained_on(opened, tmp_path):
    side = opened()[0]._samples.packing
    path = tmp_path / "tokens" / "train-00001.array_record"
    original, rng, n_found = path.read_bytes(), np.random.default_rng(0), 0

    def windows() -> list[bytes]:
        return [side.sample(0, n).ids_T.tobytes() for n in range(*side._ends[:2])]

    right, used = windows(), np.flatnonzero(np.frombuffer(original, np.uint8))  # a block of 64 KiB ends in zeros
    for place in rng.choice(used, 60):
        damaged = bytearray(original)
        damaged[place] ^= 1 << int(rng.integers(8))
        path.write_bytes(damaged)
        records._opened.cache_clear()
        try:
            assert windows() == right  # some bytes of the format are not needed
        except UserError as error:
            n_found += 1
            assert "train-00001" in str(error) and "repeat the prepare command" in str(error)
    assert n_found > 40
    path.write_bytes(original[:-1])
    records._opened.cache_clear()
    with pytest.raises(UserError, match="bytes, expected"):
        windows()
    path.unlink()
    records._opened.cache_clear()
    with pytest.raises(UserError, match="cannot be read"):
        windows()


def test_a_fingerprint_is_that_of_the_text(opened):
    first, again, other = opened()[0], opened("again", seed=4)[0], opened("other")[1]
    assert first.fingerprint() == again.fingerprint() != other.fingerprint()


def test_the_index_takes_a_few_bytes_per_shard(tmp_path):
    """Of 10^12 tokens: 62,500 shards."""
    n = 20_000
    counts = {"windows": [4096] * n, "bytes": [10**8] * n, "hash": ["f" * 24] * n}
    counts |= {"documents": 1, "tokens": 1, "text_bytes": 1}
    settings = {"version": VERSION, "shards": n, "seq_len": 4096, "vocab_size": 129_280}
    text = json.dumps({"settings": settings, "sides": {"train": counts, "holdout": counts}})
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    side = PreparedSide(tmp_path, json.loads(text), "train", mask_documents=False, seed=0)
    held = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert side.n_samples == 4096 * n
    assert held < 24 * n


def test_shares_hold_for_any_part_of_a_run():
    for weights in ([1.0], [0.7, 0.3], [5, 1, 1, 0.01], [1 / 3] * 3, [5e5, 10, 10], [1, 5e-5, 5e-5], [1e-9, 1, 1e-9]):
        shares = Shares(weights)
        assert shares.counts.sum() == PERIOD
        off = np.abs(shares.counts / PERIOD - np.array(weights) / sum(weights))
        assert shares.counts.min() >= 1 and off.max() <= (len(weights) - 1) / PERIOD
        places = [shares.place(i) for i in range(2 * PERIOD + 50)]
        for corpus in range(len(weights)):
            numbers = [number for found, number in places if found == corpus]
            assert numbers == list(range(len(numbers)))  # none twice, none left out
        found = np.array([corpus for corpus, _ in places])
        for corpus, count in enumerate(shares.counts):
            so_far = np.cumsum(found == corpus) - count / PERIOD * np.arange(1, len(found) + 1)
            assert np.abs(so_far).max() < len(weights)
        assert all(shares.number_of(*places[i]) == i for i in range(0, len(places), 617))


def test_a_mixture_has_each_corpus_in_its_own_order(prepare, settings, tmp_path):
    one, two = prepare("one"), prepare("two", n_shards=3, holdout_rate=0.3, seed=8)
    weighted = f"{one.folder}@0.75,{two.folder}@0.25"
    training, held_out = open_splits(**{**settings, "source": weighted})
    alone = [
        open_splits(**{**settings, "source": str(plan.folder), "seed": settings["seed"] + number})[0]
        for number, plan in enumerate((one, two))
    ]
    places = [training._samples.packing.shares.place(i) for i in range(100, 180)]
    expected = [alone[corpus].rows(number, 1).ids_BT[0] for corpus, number in places]
    np.testing.assert_array_equal(training.rows(100, 80).ids_BT, np.stack(expected))
    assert sum(corpus == 0 for corpus, _ in places) == 60
    rows = held_out.rows(0, held_out.n_samples).ids_BT
    assert len({*map(bytes, rows)}) >= 0.8 * len(rows)  # the two corpora have the same texts
    assert training.fingerprint() != alone[0].fingerprint()
    found = settled({**settings, "source": weighted})
    assert found["holdout_rate"] == 0.225 and found["fim_rate"] == 0.25
    assert pickle.loads(pickle.dumps(training._samples)).rows(7, 3).ids_BT.shape == (3, 32)


def test_sources_by_name(prepare, tmp_path):
    one, two = prepare("one").folder, prepare("two").folder
    assert sources(str(one)) == [(one, 1.0)]
    assert sources(f"{one},{two}@.5") == [(one, 1.0), (two, 0.5)]
    for other in ("stdlib", str(tmp_path), str(tmp_path / "*.txt"), "a,b@2", "", ",", "x" * 5000):
        assert sources(other) == []
    with pytest.raises(UserError, match="mixes prepared text with"):
        sources(f"{one},{tmp_path}")
    with pytest.raises(UserError, match="has a weight of 0"):
        sources(f"{one}@0,{two}")

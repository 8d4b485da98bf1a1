"""A batch is a pure function of its number: for any split into processes, any workers, any order."""

import numpy as np
import pytest

from deepseek_jax.data.pipeline import Batch, open_split, open_splits
from deepseek_jax.errors import UserError


def assert_equal(a, b):
    for x, y, dtype in zip(a, b, [np.int32] * 4 + [np.float32], strict=True):
        assert x.dtype == dtype
        np.testing.assert_array_equal(x, y)


def text_of(split):
    """All text of one epoch's windows, as a set of pieces long enough to be unique."""
    ids = split.rows(0, split.n_samples).ids_BT
    return {bytes(row[i : i + 16].astype(np.uint8)) for row in ids for i in range(len(row) - 15) if row[i:].max() < 256}


def test_shapes_and_facts(settings):
    split = open_split("train", **settings)
    batch = split.rows(5, 3)
    assert isinstance(batch, Batch)
    assert all(array.shape == (3, 32) for array in batch)
    assert split.vocab_size == split.tokenizer.vocab_size == 272
    assert split.n_samples == (split.n_tokens - 1) // 32
    n_fim = round(0.25 * split.n_documents)
    assert split.bytes_per_token == pytest.approx(1 - (split.n_documents + 3 * n_fim) / split.n_tokens)


@pytest.mark.parametrize("n_processes", [1, 2, 4, 8])
def test_rows_of_all_processes_are_the_batch(settings, n_processes):
    split, start, count = open_split("train", **settings), 1000, 16
    share = count // n_processes
    parts = [split.rows(start + p * share, share) for p in range(n_processes)]
    assert_equal(split.rows(start, count), map(np.concatenate, zip(*parts, strict=True)))


def test_an_epoch_is_every_window_once_and_epochs_differ(settings):
    split = open_split("train", **settings)
    epochs = [split.rows(e * split.n_samples, split.n_samples) for e in range(2)]
    for e, epoch in enumerate(epochs):
        windows = [split._samples.packing.window(e, n).tokens for n in range(split.n_samples)]
        rows = [np.append(ids[:1], targets) for ids, targets in zip(epoch.ids_BT, epoch.targets_BT, strict=True)]
        assert sorted(map(tuple, rows)) == sorted(map(tuple, windows))
        assert not np.array_equal(rows, windows)  # a batch mixes documents
    assert not np.array_equal(epochs[0].ids_BT, epochs[1].ids_BT)


def test_read_ahead_yields_the_same(settings):
    split = open_split("train", **settings)
    ranges = [(0, 4), (4, 4), (8, 6), (900, 1)]  # a ramp, and a resume
    got = list(split.batches(iter(ranges)))
    assert len(got) == 4
    for (start, count), batch in zip(ranges, got, strict=True):
        assert_equal(batch, split.rows(start, count))
    assert list(split.batches([])) == []


def test_read_ahead_can_be_left(settings):
    batches = open_split("train", **settings).batches([(i, 1) for i in range(1000)])
    next(batches)
    batches.close()


def test_reader_processes_yield_the_same(settings):
    split = open_split("train", **{**settings, "workers": 2})
    ranges = [(3 * i, 3) for i in range(5)]
    got = list(split.batches(ranges))
    assert len(got) == 5
    for (start, count), batch in zip(ranges, got, strict=True):
        assert isinstance(batch, Batch)
        assert_equal(batch, split.rows(start, count))


def test_held_out_text_is_never_trained_on(settings):
    settings["fim_rate"] = 0.0
    train, holdout = (open_split(split, **settings) for split in ("train", "holdout"))
    assert train.n_documents + holdout.n_documents == 40
    assert holdout.n_documents >= 1
    assert text_of(train)
    assert text_of(holdout)
    assert not text_of(train) & text_of(holdout)


@pytest.mark.parametrize("n_documents", [1, 3])
def test_a_few_long_documents_are_on_both_sides(settings, tmp_path, n_documents):
    text = "".join(f"{i * 7919 % 100_003} " for i in range(500))
    for i in range(n_documents):
        (tmp_path / f"{i}.book.txt").write_text(text[:: 2 * i + 1] * (2 * i + 1))
    settings.update(fim_rate=0.0, holdout_rate=0.05, source=str(tmp_path / "*.book.txt"))
    train, holdout = (open_split(split, **settings) for split in ("train", "holdout"))
    assert not holdout.has_whole_documents
    assert text_of(train)
    assert text_of(holdout)
    assert n_documents > 1 or not text_of(train) & text_of(holdout)  # the others are repetitive
    assert holdout.n_tokens == pytest.approx(0.05 * (train.n_tokens + holdout.n_tokens), rel=0.1)
    assert train.fingerprint() != open_split("train", **{**settings, "holdout_rate": 0.2}).fingerprint()


def test_held_out_order_is_fixed_complete_and_plain(settings):
    split = open_split("holdout", **settings)
    first = split.rows(0, split.n_samples)
    assert_equal(first, split.rows(split.n_samples, split.n_samples))
    assert_equal(first, open_split("holdout", **{**settings, "seed": 99}).rows(0, split.n_samples))
    assert (first.targets_BT >= 0).sum() == split.n_tokens - 1
    assert first.ids_BT.max() <= split.tokenizer.pad_id  # no FIM tokens


def test_order_of_files_does_not_matter(settings, tmp_path):
    before = open_split("train", **settings).rows(0, 8)
    for path in sorted(tmp_path.glob("*.txt")):
        path.rename(tmp_path / f"{99 - int(path.stem)}-renamed.txt")
    assert_equal(before, open_split("train", **settings).rows(0, 8))


def test_mask_documents(settings):
    batch = open_split("train", **{**settings, "mask_documents": True}).rows(0, 16)
    assert batch.segments_BT.max() > 1
    ends = batch.ids_BT == 257
    assert (batch.targets_BT[ends] == -1).all()
    assert (batch.positions_BT[:, 1:][ends[:, :-1]] == 0).all()
    plain = open_split("train", **settings).rows(0, 16)
    np.testing.assert_array_equal(plain.ids_BT, batch.ids_BT)
    assert (plain.segments_BT == 1).all()
    assert (plain.positions_BT == np.arange(32)).all()


def test_the_standard_library_trains(tmp_path, settings):
    settings.update(source="stdlib", seq_len=256, holdout_rate=0.02)
    train, holdout = (open_split(split, **settings) for split in ("train", "holdout"))
    assert train.n_tokens > 5_000_000
    assert holdout.n_samples > 10
    text = train.tokenizer.decode(train.rows(0, 32).ids_BT.ravel())
    assert "def " in text
    assert "import" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seq_len": 100_000}, "train tokens and a sample takes 100001"),
        ({"seq_len": 0}, "data.seq_len=0: expected"),
        ({"fim_rate": 1.5}, "data.fim_rate=1.5: expected"),
        ({"holdout_rate": 1.0}, "data.holdout_rate=1.0: expected"),
        ({"workers": -1}, "data.workers=-1: expected"),
    ],
)
def test_wrong_settings_are_named(settings, change, message):
    with pytest.raises(UserError, match=message):
        open_split("train", **{**settings, **change})


def test_splits_that_do_not_exist(settings):
    with pytest.raises(UserError, match="'train' or 'holdout'"):
        open_split("test", **settings)
    with pytest.raises(UserError, match="holdout_rate = 0 holds out no text"):
        open_split("holdout", **{**settings, "holdout_rate": 0.0})


def test_tokenizer_without_marks(settings, tmp_path):
    from tokenizers import Tokenizer, models

    letters = {chr(c): c - 97 for c in range(97, 123)}
    Tokenizer(models.BPE(letters, [])).save(str(tmp_path / "tokenizer.json"))
    settings["tokenizer"] = str(tmp_path)
    with pytest.raises(UserError, match="has no end-of-text token"):
        open_split("train", **settings)
    Tokenizer(models.BPE({**letters, "</s>": 26}, [])).save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(UserError, match="has no fill-in-the-middle tokens. Set data.fim_rate to 0"):
        open_split("train", **settings)
    assert open_split("train", **{**settings, "fim_rate": 0.0}).rows(0, 2).ids_BT.max() <= 26


def test_marks_in_a_text_are_text_unless_asked_for(settings, tmp_path):
    for path in tmp_path.glob("*.txt"):
        path.write_text(f"<｜User｜>{path.stem}<｜Assistant｜>\n")
    plain = open_split("train", **settings)
    read = open_split("train", **{**settings, "special_tokens": True})
    user, assistant = (plain.tokenizer.encode(mark, specials=True)[0] for mark in ("<｜User｜>", "<｜Assistant｜>"))
    for mark in (user, assistant):
        assert not (plain.rows(0, plain.n_samples).ids_BT == mark).any()
        assert (read.rows(0, read.n_samples).ids_BT == mark).sum() > 5
    assert read.n_tokens < plain.n_tokens and read.fingerprint() != plain.fingerprint()


def test_documents_begin_with_bos_where_the_tokenizer_says_so(settings, tmp_path):
    from tokenizers import Tokenizer, models

    letters = {chr(c): c - 97 for c in range(97, 123)} | {"<s>": 26, "</s>": 27}
    Tokenizer(models.BPE(letters, [])).save(str(tmp_path / "tokenizer.json"))
    settings.update(tokenizer=str(tmp_path), fim_rate=0.0, mask_documents=True)

    def begins(**change) -> np.ndarray:
        batch = open_split("train", **{**settings, **change}).rows(0, 8)
        return batch.ids_BT[:, 1:][batch.positions_BT[:, 1:] == 0]  # first tokens of documents within a window

    assert not (begins() == 26).any()
    (tmp_path / "tokenizer_config.json").write_text('{"add_bos_token": true, "bos_token": "<s>"}')
    assert (begins() == 26).all()
    assert not (begins(add_bos=False) == 26).any()


def test_what_may_be_left_out_is_as_in_the_config():
    import inspect

    from deepseek_jax.configs import base

    data = base.get_config().data
    parameters = inspect.signature(open_splits).parameters
    assert set(data) == set(parameters) - {"seed", "watch"}
    optional = {name: each.default for name, each in parameters.items() if each.default is not each.empty}
    assert {name: data[name] for name in set(optional) - {"watch"}} == {
        k: v for k, v in optional.items() if k != "watch"
    }

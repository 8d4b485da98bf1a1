"""Conversations in windows: whole, each once, attending to nothing else; those too long are cut and counted."""

import json
import random

import numpy as np
import pytest

from deepseek_jax.data import conversation_packing
from deepseek_jax.data.conversation_packing import best_fit, measure, select
from deepseek_jax.data.conversations import Encoder, Example, flatten, unflatten
from deepseek_jax.data.pipeline import open_splits, settled
from deepseek_jax.data.store import TokenStore
from deepseek_jax.errors import UserError


@pytest.mark.parametrize("size", [8, 20, 64])
def test_best_fit(size):
    """No window overflows, and no two windows could be one."""
    lengths = np.random.default_rng(size).integers(1, size + 1, 300)
    windows = best_fit(lengths, size)
    filled = np.bincount(windows, lengths)
    assert filled.max() <= size and filled.min() > 0
    assert np.sort(filled)[:2].sum() > size
    assert (np.diff(np.unique(windows, return_index=True)[1]) > 0).all()  # numbered as they come
    np.testing.assert_array_equal(best_fit(np.array([3, 5, 2, 8, 1, 4]), 8), [0, 0, 1, 2, 1, 1])
    assert best_fit(np.zeros(0, np.int64), 8).shape == (0,)


@pytest.fixture
def settings(tmp_path):
    dice = random.Random(0)
    rows = []
    for n in range(60):
        turns = [(f"{n} " + "q" * dice.randrange(30), "a" * dice.randrange(1, 40)) for _ in range(dice.randrange(1, 4))]
        messages = [
            {"role": role, "content": content}
            for turn in turns
            for role, content in zip(("user", "assistant"), turn, strict=True)
        ]
        rows.append({"messages": messages})
    (tmp_path / "talks.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return dict(
        source=str(tmp_path / "talks.jsonl"),
        text_key="text",
        format="auto",
        chat_template="v2",
        train_on="answers",
        special_tokens=False,
        add_bos=True,
        tokenizer="bytes",
        seq_len=300,
        fim_rate=0.1,
        mask_documents=False,
        holdout_rate=0.2,
        workers=0,
        cache_dir=str(tmp_path / "cache"),
        seed=3,
    )


def examples(settings) -> list[tuple[list[int], list[float]]]:
    """(ids, weights of all but the first) of every example of the file."""
    from deepseek_jax.data.corpus import open_corpus
    from deepseek_jax.data.tokenizer import open_tokenizer

    encoder = Encoder(open_tokenizer("bytes"), settings["chat_template"], settings["train_on"])
    arrays = encoder.encode_batch(list(open_corpus(settings["source"], "text").documents()))
    found = [example for array in arrays for example in unflatten(array)]
    return [(ids.tolist(), is_learnt[1:].astype(float).tolist()) for ids, is_learnt in found]


def segments(batch) -> list[tuple[list[int], list[float]]]:
    """The same of every segment of a batch."""
    found = []
    for ids, targets, numbers, positions, weights in zip(*batch, strict=True):
        for number in range(1, numbers.max() + 1):
            here = numbers == number
            np.testing.assert_array_equal(positions[here], np.arange(here.sum()))
            np.testing.assert_array_equal(ids[here][1:], targets[here][:-1])
            found.append(([*ids[here].tolist(), int(targets[here][-1])], weights[here].tolist()))
        padding = numbers == 0
        assert (targets[padding] == -1).all() and (weights[padding] == 0).all()
    return found


def test_an_epoch_is_every_conversation_once(settings):
    training, held_out = open_splits(**settings)
    assert training.n_documents + held_out.n_documents == 60 and held_out.n_documents > 3
    rows = [split.rows(0, split.n_samples) for split in (training, held_out)]
    assert all(
        row.ids_BT.shape == (split.n_samples, 300) for row, split in zip(rows, (training, held_out), strict=True)
    )
    assert sorted(segments(rows[0]) + segments(rows[1])) == sorted(examples(settings))
    again = training.rows(training.n_samples, training.n_samples)
    assert sorted(segments(again)) == sorted(segments(rows[0]))
    assert not np.array_equal(again.ids_BT, rows[0].ids_BT)
    share = sum(row.weights_BT.sum() for row in rows[:1]) / (rows[0].segments_BT > 0).sum()
    assert f"{share:.0%} of the tokens are learnt" in training.summary and "cut" not in training.summary


def test_any_process_and_reader_makes_the_same_rows(settings):
    training, _ = open_splits(**settings)
    whole = training.rows(7, 12)
    parts = [training.rows(7 + 3 * p, 3) for p in range(4)]
    for array, pieces in zip(whole, zip(*parts, strict=True), strict=True):
        np.testing.assert_array_equal(array, np.concatenate(pieces))
    (ahead,) = training.batches([(7, 12)])
    for array, other in zip(whole, ahead, strict=True):
        np.testing.assert_array_equal(array, other)


def test_long_conversations_are_cut_and_counted(settings):
    whole = examples(settings)
    settings.update(seq_len=40, holdout_rate=0.0)
    training, none = open_splits(**settings)
    assert none is None
    cut = [(ids[:41], weights[:40]) for ids, weights in whole]
    kept = [one for one in cut if any(one[1])]
    assert sorted(segments(training.rows(0, training.n_samples))) == sorted(kept)
    n_cut = sum(len(ids) > 41 for (ids, _), (_, weights) in zip(whole, cut, strict=True) if any(weights))
    assert f"{n_cut} cut at data.seq_len" in training.summary and n_cut > 3
    assert f"{len(cut) - len(kept)} with no answer before it left out" in training.summary and len(cut) > len(kept)


def test_bytes_per_token_are_those_that_are_learnt(settings):
    training, _ = open_splits(**settings)
    batch = training.rows(0, training.n_samples)
    lengths = training.tokenizer.byte_lengths()[np.maximum(batch.targets_BT, 0)]
    expected = (lengths * batch.weights_BT).sum() / batch.weights_BT.sum()
    assert training.bytes_per_token == pytest.approx(expected)


def test_a_run_is_known_by_what_decides_its_tokens(settings):
    prints = [open_splits(**settings)[0].fingerprint()]
    for change in ({"train_on": "last"}, {"chat_template": "v3"}):
        prints.append(open_splits(**{**settings, **change})[0].fingerprint())
    assert len(set(prints)) == 3 and open_splits(**settings)[0].fingerprint() == prints[0]


def test_conversations_settle_the_other_keys(settings):
    assert settled(settings) == {
        "format": "conversations",
        "chat_template": "v2",
        "mask_documents": True,
        "fim_rate": 0.0,
    }
    assert settled({**settings, "source": "stdlib"}) == {"format": "text"}
    with pytest.raises(UserError, match="Set data.chat_template"):
        settled({**settings, "chat_template": ""})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"holdout_rate": 0.9999999}, "holds out every conversation"),
        ({"seq_len": 1}, "has 0 train tokens and no answer begins within data.seq_len = 1"),
        ({"train_on": "all"}, "data.train_on = 'all' does not exist"),
        ({"chat_template": "coder"}, "the tokenizer has no special token"),
    ],
)
def test_wrong_settings_are_named(settings, change, message):
    with pytest.raises(UserError, match=message):
        open_splits(**{**settings, **change})


@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_a_document_of_many_examples(marked_bytes, monkeypatch, chunk):
    """If later prompts leave out thoughts, every answer is an example with its own start in the table."""
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "t"}]
    (array,) = Encoder(marked_bytes, "r1", "answers").encode_batch([json.dumps({"messages": messages * 3})])

    short = flatten([Example(np.zeros(4, np.int32), np.zeros(4, bool))])  # nothing to learn
    lengths = np.array([len(short), len(array)])
    store = TokenStore(np.concatenate([short, array]), lengths, lengths, lengths, np.cumsum(lengths) - lengths, None)
    monkeypatch.setattr(conversation_packing, "CHUNK_TOKENS", chunk)
    table, counts = select(*measure(store, 100, marked_bytes.byte_lengths()), np.array([1, 0]))
    assert table.document.tolist() == [1, 1, 1] and counts == (0, 1)
    assert table.start.tolist() == [0, *np.cumsum([len(ids) for ids, _ in unflatten(array)])[:2]]
    assert table.n_learnt.tolist() == [7, 7, 7] and table.n_bytes.tolist() == [5, 5, 5]

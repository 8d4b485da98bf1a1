"""An epoch is its documents end to end; windows cover the stream, each target once."""

import dataclasses

import numpy as np
import pytest

from deepseek_jax.data.fim import FimTokens
from deepseek_jax.data.holdout import Pieces, whole
from deepseek_jax.data.packing import Packing, Window, lay_out, sample
from deepseek_jax.data.store import TokenStore

EOS, PAD, MARKS = 900, 901, FimTokens(902, 903, 904)


def store_of(lengths):
    lengths = np.array(lengths, np.int64)
    offsets = np.cumsum(lengths) - lengths
    return TokenStore(np.arange(lengths.sum()), lengths, lengths, lengths.astype(np.uint64), offsets, None)


def packing_of(lengths, seq_len=5, fim_rate=0.0, seed=0, shuffle=True, pad_tail=False, bos_id=None):
    store = store_of(lengths)
    pieces = whole(np.arange(len(lengths)), store.lengths)
    return Packing(store, pieces, seq_len, bos_id, EOS, PAD, MARKS, fim_rate, seed, shuffle, pad_tail, False)


def stream(packing, epoch):
    """The epoch's tokens, from its windows."""
    windows = [packing.window(epoch, n).tokens for n in range(packing.n_samples)]
    return np.concatenate([windows[0][:1], *(window[1:] for window in windows)])


def test_by_hand():
    packing = packing_of([3, 1, 4], seq_len=4, shuffle=False, pad_tail=True)
    # 0 1 2 eos 3 eos 4 5 6 7 eos: ten targets in windows of four
    assert packing.n_tokens == 11
    assert packing.n_samples == 3
    expected = [
        Window([0, 1, 2, EOS, 3], [1, 1, 1, 1, 2]),
        Window([3, EOS, 4, 5, 6], [1, 1, 2, 2, 2]),
        Window([6, 7, EOS, PAD, PAD], [1, 1, 1, 0, 0]),
    ]
    for n, window in enumerate(expected):
        tokens, numbers = packing.window(0, n)
        np.testing.assert_array_equal(tokens, window.tokens)
        np.testing.assert_array_equal(numbers, window.numbers)


def test_segments_and_positions_by_hand():
    window = Window(np.array([7, EOS, 4, 5, EOS, PAD]), np.array([1, 1, 2, 2, 2, 0]))
    open_, masked = sample(window, mask_documents=False), sample(window, mask_documents=True)
    for got in (open_, masked):
        assert [array.dtype for array in got] == [np.int32] * 4 + [np.float32]
        np.testing.assert_array_equal(got.weights_T, got.targets_T >= 0)
    np.testing.assert_array_equal(open_.ids_T, [7, EOS, 4, 5, EOS])
    np.testing.assert_array_equal(open_.targets_T, [EOS, 4, 5, EOS, -1])
    np.testing.assert_array_equal(open_.segments_T, [1, 1, 1, 1, 1])
    np.testing.assert_array_equal(open_.positions_T, [0, 1, 2, 3, 4])
    np.testing.assert_array_equal(masked.targets_T, [EOS, -1, 5, EOS, -1])
    np.testing.assert_array_equal(masked.segments_T, [1, 1, 2, 2, 2])
    np.testing.assert_array_equal(masked.positions_T, [0, 1, 0, 1, 2])


@pytest.mark.parametrize("seq_len", [1, 2, 7, 64])
@pytest.mark.parametrize("fim_rate", [0.0, 0.5, 1.0])
def test_windows_cover_the_stream_once(seq_len, fim_rate):
    lengths = [1, 9, 2, 30, 1, 17, 5]
    packing = packing_of(lengths, seq_len, fim_rate)
    tokens = stream(packing, epoch=3)
    dropped = packing.n_tokens - len(tokens)
    assert 0 <= dropped < seq_len
    # The stream built naively from the epoch's order.
    order, ends, is_fim = lay_out(packing, 3)
    naive = np.concatenate([np.concatenate(packing._parts(3, place, is_fim[place])) for place in order])
    assert len(naive) == packing.n_tokens == ends[-1]
    np.testing.assert_array_equal(tokens, naive[: len(tokens)])
    text = naive[naive < EOS]
    np.testing.assert_array_equal(np.sort(text), np.arange(sum(lengths)))
    assert (naive == EOS).sum() == len(lengths)
    assert (naive == MARKS.hole).sum() == round(fim_rate * len(lengths))


def test_padded_tail_loses_nothing():
    packing = packing_of([4, 4, 4], seq_len=6, shuffle=False, pad_tail=True)
    rows = [sample(packing.window(0, n), False) for n in range(packing.n_samples)]
    targets = np.concatenate([row.targets_T for row in rows])
    assert (targets >= 0).sum() == packing.n_tokens - 1
    assert rows[-1].segments_T[-1] == 0


def test_epochs_and_seeds_differ_and_repeat():
    lengths = [20] * 20
    streams = [stream(packing_of(lengths, seed=seed), epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(one) for one in streams}) == 4
    np.testing.assert_array_equal(streams[3], stream(packing_of(lengths, seed=1), 1))


def test_a_window_is_the_same_whenever_it_is_asked_for():
    first, second = packing_of([9] * 9, fim_rate=0.5), packing_of([9] * 9, fim_rate=0.5)
    asked = [(epoch, n) for epoch in range(7) for n in range(3)]
    forward = {where: first.window(*where) for where in asked}
    for where in reversed(asked):
        np.testing.assert_array_equal(forward[where].tokens, second.window(*where).tokens)


def test_documents_begin_with_bos_where_it_is_asked_for():
    """A document that is FIM as well; the end of a cut one has no start."""
    packing = packing_of([3, 1, 4], seq_len=4, fim_rate=1.0, shuffle=False, pad_tail=True, bos_id=905)
    parts = [np.concatenate(packing._parts(0, place, True)) for place in range(3)]
    assert all(part[:2].tolist() == [905, MARKS.begin] and part[-1] == EOS for part in parts)
    np.testing.assert_array_equal(stream(packing, 0)[: packing.n_tokens], np.concatenate(parts))
    assert packing.n_tokens == 8 + 3 * (1 + 3 + 1)
    ends = Pieces(np.arange(3), np.array([0, 0, 2]), np.array([3, 1, 4]))
    cut = dataclasses.replace(packing, pieces=ends, fim_rate=0.0)
    np.testing.assert_array_equal(stream(cut, 0)[: cut.n_tokens], [905, 0, 1, 2, EOS, 905, 3, EOS, 6, 7, EOS])
    assert packing.fingerprint() != packing_of([3, 1, 4], shuffle=False).fingerprint()

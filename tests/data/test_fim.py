"""FIM rearranges and loses nothing; its choices are uniform and depend on (seed, epoch, document) alone."""

import numpy as np
import pytest

from deepseek_jax.data import fim
from deepseek_jax.data.noise import CUT, ORDER, noise

MARKS = fim.FimTokens(begin=1000, hole=1001, end=1002)


def invert(tokens):
    """begin pre hole suf end mid → pre mid suf."""
    begin, hole, end = (int(np.flatnonzero(tokens == mark)[0]) for mark in MARKS)
    assert begin == 0
    return np.concatenate([tokens[1:hole], tokens[end + 1 :], tokens[hole + 1 : end]])


@pytest.mark.parametrize("length", [0, 1, 2, 3, 50])
@pytest.mark.parametrize("document", range(10))
def test_inverts_to_the_document(length, document):
    tokens = np.arange(length)
    parts = fim.rearrange(tokens, MARKS, seed=1, epoch=2, document=document)
    whole = np.concatenate(parts)
    assert len(whole) == length + fim.EXTRA_TOKENS
    np.testing.assert_array_equal(invert(whole), tokens)


def test_cuts_are_uniform_and_differ_by_epoch():
    tokens = np.arange(9)
    middles = np.zeros(10)
    for document in range(2000):
        parts = fim.rearrange(tokens, MARKS, 0, 0, document)
        middles[len(parts[5])] += 1
    # |a - b| of two uniform numbers of 0…9: 10 ways to be 0, 2(10-k) to be k > 0
    expected = np.array([10] + [2 * (10 - k) for k in range(1, 10)]) / 100 * 2000
    np.testing.assert_allclose(middles, expected, atol=5 * np.sqrt(expected.max()))
    cuts = [tuple(map(len, fim.rearrange(np.arange(1000), MARKS, 0, epoch, 0))) for epoch in range(4)]
    assert len(set(cuts)) == 4


def test_rate_is_exact_in_every_epoch_and_fair_over_epochs():
    chosen = np.stack([fim.choose(50, 0.1, seed=0, epoch=epoch) for epoch in range(1000)])
    assert (chosen.sum(1) == 5).all()
    np.testing.assert_allclose(chosen.mean(0), 0.1, atol=5 * np.sqrt(0.09 / 1000))
    assert not fim.choose(50, 0.0, 0, 0).any()
    assert fim.choose(50, 1.0, 0, 0).all()


def test_noise_is_a_function_of_keys_and_counter():
    whole = noise(3, 5, ORDER, at=np.arange(1000))
    np.testing.assert_array_equal(whole[700:], noise(3, 5, ORDER, at=np.arange(700, 1000)))
    for keys in ((3, 5, CUT), (3, 6, ORDER), (5, 3, ORDER), (-3, 5, ORDER), (3 + 2**40, 5, ORDER)):
        assert not np.isin(noise(*keys, at=np.arange(1000)), whole).any()
    bits = np.unpackbits(whole.view(np.uint8))
    assert abs(bits.mean() - 0.5) < 0.01
    assert int(noise(at=np.arange(1))[0]) == 0xE220A8397B1DCDAF  # the first output of splitmix64 seeded with 0

"""Prompts that cannot be continued are refused before anything runs."""

import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.serve.prompts import check_prompts


@pytest.mark.parametrize(
    ("prompts", "n_new", "message"),
    [
        ([[1] * 32], 10, r"a prompt of 32 tokens fills the 32 positions .* \(the last 16 tokens\)"),
        ([[1] * 99], 10, "a prompt of 99 tokens fills the 32 positions"),
        ([[1] * 11], 22, "11 tokens and 22 new ones exceed the 32 positions .* Ask for 21 or fewer"),
        ([[]], 10, "a prompt is empty"),
        ([], 10, "a prompt is empty"),
        ([[1], [[2], [3, 4]]], 10, "a prompt is empty"),
        ([[1, 272]], 10, "ids from 1 to 272: expected 0 to 271"),
        ([[-1]], 10, "ids from -1 to -1"),
        ([[2**40]], 10, "a prompt with ids from 1099511627776"),
        ([[1.5]], 10, r"a prompt is \[1.5\]: expected a list of ids"),
        ([[None]], 10, r"a prompt is \[None\]: expected a list of ids"),
    ],
)
def test_what_cannot_be_is_refused(prompts, n_new, message):
    with pytest.raises(UserError, match=message):
        check_prompts(prompts, n_new, 32, 272)


def test_prompts_become_lists_and_may_use_all_positions():
    assert check_prompts([np.array([5, 6], np.uint8), (7,)], 30, 32, 272) == [[5, 6], [7]]

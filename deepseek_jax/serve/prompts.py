"""Prompts as callers give them, checked before anything runs."""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.errors import UserError


def check_prompts(
    prompts: Sequence[Sequence[int]], max_new_tokens: int, n_positions: int, vocab_size: int
) -> list[list[int]]:
    """Returns prompts as lists of ids.

    Raises UserError: there is none or an empty one, an id is unknown or not a whole number, or a prompt and its new
    tokens exceed `n_positions`.
    """
    rows = [_as_ids(prompt) for prompt in prompts]
    if not rows or not all(row.ndim == 1 and len(row) for row in rows):
        raise UserError("a prompt is empty: expected one token or more.")
    for row in rows:
        if row.min() < 0 or row.max() >= vocab_size:
            raise UserError(f"a prompt with ids from {row.min()} to {row.max()}: expected 0 to {vocab_size - 1}.")
    longest = max(map(len, rows))
    if longest >= n_positions:
        raise UserError(
            f"a prompt of {longest} tokens fills the {n_positions} positions that the model was trained on. "
            f"Give the end of the text alone (the last {n_positions // 2} tokens), or raise n_positions."
        )
    if longest + max_new_tokens > n_positions:
        raise UserError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the {n_positions} positions that "
            f"the model was trained on. Ask for {n_positions - longest} or fewer, or raise n_positions."
        )
    return [row.tolist() for row in rows]


def _as_ids(prompt: Sequence[int]) -> np.ndarray:
    """Returns a prompt as an array. Raises UserError for fractions, which are not truncated."""
    try:
        ids = np.asarray(prompt)
    except ValueError:  # lists of different lengths inside
        ids = np.zeros((0, 0))
    if ids.size and not np.issubdtype(ids.dtype, np.integer):
        raise UserError(f"a prompt is {str(prompt)[:60]}: expected a list of ids, which are whole numbers.")
    return ids

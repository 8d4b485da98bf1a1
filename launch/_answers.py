"""What a model answers to held-out conversations, beside the answers expected."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from deepseek_jax.launch._continuation import write
from deepseek_jax.storage import Place

if TYPE_CHECKING:
    from deepseek_jax.data.pipeline import Batch, Split
    from deepseek_jax.data.tokenizer import Tokenizer

SHOWN = 4  # answers
LONGEST = 512  # tokens of an answer


class Asked(NamedTuple):
    """A prompt and the answer to it, ids."""

    prompt: list[int]
    answer: list[int]


def show_answers(config: ConfigDict, workdir: Place) -> None:
    """Prints the likeliest answers of the model of `workdir` to held-out conversations, if there are any."""
    from deepseek_jax.data.pipeline import open_splits
    from deepseek_jax.language_model import load

    _, held_out = open_splits(seed=config.seed, **config.data)
    if held_out is None:
        return
    model = load(workdir)
    questions = [one for one in first_answers(held_out) if len(one.prompt) < model.n_positions][:SHOWN]
    for asked in questions:
        n_new = min(LONGEST, len(asked.answer) + 16, model.n_positions - len(asked.prompt))
        ids = list(model.stream(asked.prompt, n_new, temperature=0.0))
        write(f"asked     {spelled(asked.prompt, model.tokenizer)}\n")
        write(f"  says    {spelled(ids, model.tokenizer)}\n  learnt  {spelled(asked.answer, model.tokenizer)}\n")


def spelled(ids: list[int], tokenizer: "Tokenizer") -> str:
    """Returns ids as text in one line, special tokens spelled out."""
    return tokenizer.decode(ids, specials=True).replace("\n", "\\n")


def first_answers(held_out: "Split") -> Iterator[Asked]:
    """Yields the first answer of each example of the first windows."""
    for n in range(min(held_out.n_samples, SHOWN)):
        yield from in_window(held_out.rows(n, 1))


def in_window(batch: "Batch") -> Iterator[Asked]:
    """Yields the first answer of each example of a window [1, T]."""
    ids_T, targets_T, segments_T, _, weights_T = (array[0] for array in batch)
    for segment in range(1, int(segments_T.max()) + 1):
        places = np.flatnonzero(segments_T == segment)
        learnt = weights_T[places] > 0
        start = int(learnt.argmax())
        stop = start + int((~learnt[start:]).argmax() if not learnt[start:].all() else len(learnt) - start)
        yield Asked(ids_T[places[: start + 1]].tolist(), targets_T[places[start:stop]].tolist())

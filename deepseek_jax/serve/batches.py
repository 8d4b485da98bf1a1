"""Parts of requests as the arrays of programs: for each device its rows, padded, one device after the other.

`plans` has the parts of each device. All devices get equally many rows, `n_rows`; those that are padding compute
nothing that anybody sees. Rows are on the first axis of every array.
"""

from collections.abc import Callable, Sequence

import numpy as np

from deepseek_jax.serve import sampling as drawing
from deepseek_jax.serve.pages import NULL
from deepseek_jax.serve.programs import Rows
from deepseek_jax.serve.sampling import Kind, Sampling
from deepseek_jax.serve.scheduler import Part

LEAST_TOKENS, LEAST_PAGES = 16, 4  # of a program: smaller ones would save little
DRAWN = -1  # in place of the token that a row drew last, and of its position where the host does not know it

Plans = Sequence[Sequence[Part]]  # by device


def sampling_of(part: Part) -> Sampling:
    """How a part's request draws."""
    return part.request.options.sampling


def kind_of(plans: Plans) -> Kind:
    """What the drawing of these rows needs."""
    parts = [part for plan in plans for part in plan]
    if any(part.request.options.is_constrained for part in parts):
        return "shaped"
    return drawing.kind([sampling_of(part) for part in parts])


def n_top_of(plans: Plans) -> int:
    """The number of likeliest tokens that these rows report; -1 if none reports log-probabilities."""
    return max(sampling_of(part).n_top for plan in plans for part in plan)


def recites(part: Part) -> bool:
    """Whether the log-probabilities of a prompt's tokens after this part are to be reported."""
    return sampling_of(part).prompt_logprobs and part.start + 1 < len(part.request.prompt)


def rows_of(plans: Plans) -> int:
    """Rows per device, padded."""
    return bucket(max(map(len, plans)), 1)


def width_of(plans: Plans, page_size: int, least: int, look_ahead: int = 0) -> int:
    """Pages that the longest of these rows has with `look_ahead` tokens after it, padded to `least` or more."""
    n_positions = look_ahead + max(part.n_positions for plan in plans for part in plan)
    return bucket(-(-n_positions // page_size), least)


def together(parts: Sequence[Part], most: int, is_alone: Callable[[Part], bool]) -> list[list[Part]]:
    """Parts of prompts in groups that one program computes: up to `most`, of one padded length and position.

    A part that continues a prompt may read pages of a part before it, so it joins none but the last group.
    """
    groups: list[list[Part]] = []
    for part in parts:
        open_ones = groups if part.start == 0 else groups[-1:]
        like = (one for one in open_ones if len(one) < most and _place(one[0]) == _place(part))
        group = next((one for one in like if not (is_alone(part) or is_alone(one[0]))), None)
        if group:
            group.append(part)
        else:
            groups.append([part])
    return groups


def _place(part: Part) -> tuple[int, int]:
    return part.start, bucket(part.n_tokens, LEAST_TOKENS)


def prompts(plans: Plans, n_rows: int, length: int, width: int) -> Rows:
    """Parts of prompts, those of a device from one position on: ids_BT, n_B, start_B, table_BN."""

    def build(parts: Sequence[Part]) -> Rows:
        ids_BT = np.zeros((n_rows, length), np.int32)
        for row, (request, start, n_tokens, *_) in enumerate(parts):
            ids_BT[row, :n_tokens] = request.tokens[start : start + n_tokens]
        n_B = numbers([part.n_tokens for part in parts], n_rows, padding=1)
        return {"ids_BT": ids_BT, "n_B": n_B} | _places(parts, n_rows, width)

    return by_device(plans, build)


def next_of_prompts(plans: Plans, length: int) -> Rows:
    """The tokens after those of a part of a prompt: next_BT; `DRAWN` where there is none yet."""

    def build(parts: Sequence[Part]) -> Rows:
        next_BT = np.zeros((1, length), np.int32)
        for row, (request, start, n_tokens, *_) in enumerate(parts):
            ids = request.tokens[start + 1 : start + 1 + n_tokens]
            next_BT[row, :n_tokens] = [*ids, *[DRAWN] * (n_tokens - len(ids))]
        return {"next_BT": next_BT}

    return by_device(plans, build)


def singles(plans: Plans, n_rows: int, width: int, padding_slot: int) -> Rows:
    """Rows that compute one token each: ids_B and start_B (`DRAWN` where only the device has it), slot_B, table_BN."""

    def build(parts: Sequence[Part]) -> Rows:
        ids = [_known(part) for part in parts]
        return {"ids_B": numbers(ids, n_rows, DRAWN)} | _places(parts, n_rows, width)

    return by_device(plans, build) | slots(plans, n_rows, padding_slot)


def slots(plans: Plans, n_rows: int, padding_slot: int) -> Rows:
    """slot_B: where rows keep what they drew last."""

    def build(parts: Sequence[Part]) -> Rows:
        return {"slot_B": numbers([part.request.options.slot for part in parts], n_rows, padding_slot)}

    return by_device(plans, build)


def positions(plans: Plans, n_rows: int) -> Rows:
    """position_B: of the tokens that are drawn."""

    def build(parts: Sequence[Part]) -> Rows:
        return {"position_B": numbers([part.start + part.n_tokens for part in parts], n_rows)}

    return by_device(plans, build)


def tables(plans: Plans, n_rows: int, width: int) -> Rows:
    """table_BN: the rows' pages."""
    return by_device(plans, lambda parts: {"table_BN": _places(parts, n_rows, width)["table_BN"]})


def limits(plans: Plans, n_rows: int) -> Rows:
    """n_draws_B and stop_BJ: when rows end."""

    def build(parts: Sequence[Part]) -> Rows:
        stop_BJ = drawing.stops([sampling_of(part) for part in parts], n_rows)
        return {"n_draws_B": numbers([part.n_draws for part in parts], n_rows), "stop_BJ": stop_BJ}

    return by_device(plans, build)


def ends(plans: Plans, n_rows: int) -> Rows:
    """end_B: the most tokens that rows can have."""
    return by_device(plans, lambda parts: {"end_B": numbers([part.request.n_positions for part in parts], n_rows)})


def how(plans: Plans, n_rows: int, kind: Kind, padding_slot: int) -> Rows:
    """How rows draw; if some are shaped also where their prompts end, and their places in `allowed_RW`."""

    def build(parts: Sequence[Part]) -> Rows:
        found = drawing.arguments([sampling_of(part) for part in parts], n_rows, kind)
        if kind != "shaped":
            return found
        n_prompts, options = [len(part.request.prompt) for part in parts], [part.request.options for part in parts]
        masks = [one.slot if one.is_constrained else padding_slot for one in options]
        return found | {"n_prompt_B": numbers(n_prompts, n_rows), "mask_B": numbers(masks, n_rows, padding_slot)}

    return by_device(plans, build)


def by_device(plans: Plans, build: Callable[[Sequence[Part]], Rows]) -> Rows:
    """What `build` makes for each device, one after the other."""
    made = [build(parts) for parts in plans]
    return made[0] if len(made) == 1 else {name: np.concatenate([rows[name] for rows in made]) for name in made[0]}


def numbers(values: Sequence[int], n_rows: int, padding: int = 0) -> np.ndarray:
    """One number per row."""
    return np.array([*values, *[padding] * (n_rows - len(values))], np.int32)


def bucket(n: int, least: int) -> int:
    """Returns `n` rounded up to a power of two, at least `least`."""
    return max(least, 1 << (n - 1).bit_length())


def buckets(least: int, most: int) -> list[int]:
    """All that `bucket` can give for numbers up to `most`."""
    return [least << i for i in range((bucket(most, least) // least).bit_length())]


def _known(part: Part) -> int:
    tokens = part.request.tokens
    return tokens[part.start] if part.start < len(tokens) else DRAWN


def _places(parts: Sequence[Part], n_rows: int, width: int) -> Rows:
    """Where rows begin and their pages, padded to `n_rows` and to `width` pages."""
    table_BN = np.full((n_rows, width), NULL, np.int32)
    for row, part in enumerate(parts):
        pages = part.request.table.pages[:width]
        table_BN[row, : len(pages)] = pages
    starts = [DRAWN if part.n_unsure else part.start for part in parts]
    return {"table_BN": table_BN, "start_B": numbers(starts, n_rows)}

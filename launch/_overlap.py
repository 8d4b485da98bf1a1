"""What devices of a group do at the same time: how much of the exchange of tokens is hidden, and how long they wait.

From the operations that a GPU ran, each on one of its streams (`launch._profile`):

    compute    time in which some kernel ran besides collectives; `compute_most` is that of the busiest device, for
               which the others wait
    exchange   time of all_to_all; hidden as far as compute ran meanwhile
    nccl       time in which some collective ran, a pipeline's transfers included, which wait inside for their partner
    waiting    time in which nothing ran but transfers between stages, which take as long as the slower rank, or nothing

Transfers wait for their partner inside the kernel, so a pipeline's bubble shows as transfers and not as idle time.
"""

import collections
from collections.abc import Callable, Iterable

from deepseek_jax.launch._profile import Event

# operations by the beginnings of their names, which are those of XLA or, with underscores, of JAX
EXCHANGES = ("all-to-all", "ragged-all-to-all")
TRANSFERS = ("collective-permute", "ppermute")
REDUCTIONS = ("all-reduce", "psum", "all-gather", "reduce-scatter")
Spans = list[tuple[float, float]]  # disjoint, in order


def summary(events: Iterable[Event], is_main: Callable[[str], bool]) -> dict[str, float]:
    """Returns milliseconds, means over the devices but for `compute_most`.

    Args:
        events: of compiled programs, on all devices; those of a device share the first entry of their `line`.
        is_main: whether an operation of this name belongs to ops that run a forward and a backward pass at once.
    """
    by_device: dict[object, list[Event]] = collections.defaultdict(list)
    for event in events:
        by_device[event.line[0]].append(event)
    found = [_of_device(mine, is_main) for mine in by_device.values()]
    means = {key: sum(parts[key] for parts in found) / len(found) / 1e3 for key in (found[0] if found else ())}
    return means | ({"compute_most": max(parts["compute"] for parts in found) / 1e3} if found else {})


def _of_device(events: list[Event], is_main: Callable[[str], bool]) -> dict[str, float]:
    """Returns microseconds."""

    def of(*kinds: str, keep: Callable[[str], bool] = lambda name: True) -> Spans:
        return union((e.begin, e.begin + e.taken) for e in events if is_one(e, kinds) and keep(e.name))

    def is_one(event: Event, kinds: tuple[str, ...]) -> bool:
        return event.name.replace("_", "-").startswith(kinds)

    collectives = (*EXCHANGES, *TRANSFERS, *REDUCTIONS)
    compute = union((e.begin, e.begin + e.taken) for e in events if not is_one(e, collectives))
    exchange, main = of(*EXCHANGES), of(*EXCHANGES, keep=is_main)
    worked = union([*compute, *exchange, *of(*REDUCTIONS)])
    begin, end = min(e.begin for e in events), max(e.begin + e.taken for e in events)
    return {
        "step": end - begin,
        "compute": length(compute),
        "exchange": length(exchange),
        "exchange_hidden": shared(exchange, compute),
        "main_exchange": length(main),
        "main_exchange_hidden": shared(main, compute),
        "reductions": length(of(*REDUCTIONS)),
        "nccl": length(of(*collectives)),
        "waiting": end - begin - length(worked),
    }


def union(spans: Iterable[tuple[float, float]]) -> Spans:
    """Returns the time that any of `spans` (begin, end) covers."""
    found: Spans = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((begin, end))
    return found


def length(spans: Spans) -> float:
    """Returns the length of disjoint spans."""
    return sum(end - begin for begin, end in spans)


def shared(some: Spans, others: Spans) -> float:
    """Returns the length of the time that both cover."""
    return length(some) + length(others) - length(union([*some, *others]))

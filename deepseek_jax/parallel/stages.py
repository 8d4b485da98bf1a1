"""Pipeline stages: how layers are divided into them, and which stages each device along the pipeline holds.

Pure Python without devices: `deepseek-jax plan` reads the same functions as a run, so that both describe one division.
PP is the number of stages.

| schedule | devices | stages per device | micro-batches in flight |
| --- | --- | --- | --- |
| 1f1b | PP | 1 | PP on the first, 1 on the last |
| 1f1b_paired | PP | 1 | 2 PP on the first, 2 on the last |
| zb1p | PP | 1 | PP |
| dualpipe | PP | 2, in opposite directions: two copies of the model | PP + 1 |
| dualpipev | PP/2 | 2, in a V | PP + 1 |

Sources: V3 report, section 3.2.1 and table 2; the DualPipe repository's README; zero bubble: arXiv 2401.10241.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class StageShare:
    """A stage on a device."""

    stage: int  # number of the stage
    share: float  # fraction of a pipeline's micro-batches that pass the stage on this device
    in_flight: int  # largest number of micro-batches whose activations it keeps at once


@dataclass(frozen=True)
class Arrangement:
    """How the stages of a pipeline lie on its devices."""

    # `hold(rank, devices along the pipeline)` returns the stages on a device
    hold: Callable[[int, int], tuple[StageShare, ...]]
    stages_per_device: int = 1  # 1 or 2
    copies: int = 1  # copies of the model in one pipeline
    even: bool = False  # whether the number of devices along the pipeline must be even

    def n_stages(self, n_devices: int) -> int:
        """Returns the number of stages of a pipeline over so many devices: PP."""
        return n_devices * self.stages_per_device // self.copies


def there_and_back(rank: int, n_stages: int, share: float) -> tuple[StageShare, ...]:
    """Returns the two stages on a device through which micro-batches pass in both directions."""
    return StageShare(rank, share, n_stages - rank), StageShare(n_stages - 1 - rank, share, rank + 1)


ARRANGEMENTS = {
    "1f1b": Arrangement(hold=lambda rank, n: (StageShare(rank, 1.0, n - rank),)),
    "1f1b_paired": Arrangement(hold=lambda rank, n: (StageShare(rank, 1.0, 2 * (n - rank)),)),
    "zb1p": Arrangement(hold=lambda rank, n: (StageShare(rank, 1.0, n),)),
    "dualpipe": Arrangement(
        hold=lambda rank, n: there_and_back(rank, n, 0.5), stages_per_device=2, copies=2, even=True
    ),
    "dualpipev": Arrangement(hold=lambda rank, n: there_and_back(rank, 2 * n, 1.0), stages_per_device=2),
}


def divide(n_layers: int, n_stages: int, end: float, folded: bool) -> tuple[int, ...]:
    """Returns the number of layers per stage. Layers are given out one at a time to the device with the least work.

    Among equals the first device wins. The last stage does as much additional work as `end` layers and may have none;
    every other stage gets at least one. On a device with two stages (`folded`) both get the same work, so that a
    forward pass of one and a backward pass of the other take as long on all devices; an odd layer goes to the first.
    """
    device = [min(s, n_stages - 1 - s) if folded else s for s in range(n_stages)]
    least = [1] * (n_stages - 1) + [0 if n_stages > 1 else 1]
    layers = [sum(n for n, d in zip(least, device, strict=True) if d == mine) for mine in range(max(device) + 1)]
    load: list[float] = list(layers)
    load[device[-1]] += end
    for _ in range(n_layers - sum(layers)):
        idle = load.index(min(load))
        load[idle] += 1
        layers[idle] += 1
    if not folded:
        return tuple(layers)
    second = [n // 2 for n in layers]
    second[device[-1]] = max(math.ceil((layers[device[-1]] - end - 1) / 2), 0)
    if n_stages % 2:  # the middle stage is alone on its device
        second[-1] = 0
    first = [n - m for n, m in zip(layers, second, strict=True)]
    return (*first, *reversed(second[: n_stages - len(first)]))


def slices(stacks: Mapping[str, int], layers_per_stage: Sequence[int]) -> tuple[dict[str, slice], ...]:
    """Returns the layers of each stack (name -> how many, in the order of running) that each stage holds.

    `layers_per_stage` is from `divide`. A stack of which a stage holds none is left out there.
    """
    ends = list(itertools.accumulate(layers_per_stage))
    firsts = dict(zip(stacks, itertools.accumulate(stacks.values(), initial=0), strict=False))  # of all layers

    def stage(begin: int, end: int) -> dict[str, slice]:
        parts = {name: (max(begin - firsts[name], 0), min(end - firsts[name], n)) for name, n in stacks.items()}
        return {name: slice(first, last) for name, (first, last) in parts.items() if first < last}

    return tuple(stage(begin, end) for begin, end in itertools.pairwise([0, *ends]))

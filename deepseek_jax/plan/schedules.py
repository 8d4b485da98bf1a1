"""Pipeline schedules: what each device holds, how many micro-batches are in flight, how long devices wait.

For one stage and micro-batch, F is the time of the forward pass, B of the whole backward pass, W of its part that
computes weight gradients, and F&B of a forward and a backward pass overlapped. PP is the number of stages.

| schedule | bubble | devices | stages per device | micro-batches in flight |
| --- | --- | --- | --- | --- |
| 1F1B | (PP - 1) (F + B) | PP | 1 | PP on the first, 1 on the last |
| ZB1P | (PP - 1) (F + B - 2W) | PP | 1 | PP |
| DualPipe | (PP/2 - 1) (F&B + B - 3W) | PP | 2, in opposite directions: two copies of the model | PP + 1 |
| DualPipeV | (PP/2 - 1) (F&B + B - 3W) | PP/2 | 2, in a V | PP + 1 |

Sources: V3 report, section 3.2.1 and table 2; the DualPipe repository's README; zero bubble: arXiv 2401.10241.
"""

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_jax.errors import UserError


@dataclass(frozen=True)
class StageShare:
    """A stage on a device.

    Attributes:
        stage: number of the stage.
        share: fraction of a pipeline's micro-batches that pass the stage on this device.
        in_flight: largest number of micro-batches whose activations it keeps at once.
    """

    stage: int
    share: float
    in_flight: int


@dataclass(frozen=True)
class Times:
    """Seconds per stage and micro-batch.

    Attributes:
        forward: F.
        backward: B, input and weight gradients.
        weights: W.
        both: F&B.
    """

    forward: float
    backward: float
    weights: float
    both: float


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule.

    Attributes:
        title, formula: name and formula as shown to people.
        bubble: `bubble(PP, times)` returns the seconds that a device waits per step.
        hold: `hold(rank, devices along the pipeline)` returns the stages on a device.
        stages_per_device: 1 or 2.
        copies: copies of the model in one pipeline.
        overlaps: whether the forward pass of one micro-batch and the backward pass of another hide their exchanges.
        even: whether the number of devices along the pipeline must be even.
    """

    title: str
    formula: str
    bubble: Callable[[int, Times], float]
    hold: Callable[[int, int], tuple[StageShare, ...]]
    stages_per_device: int = 1
    copies: int = 1
    overlaps: bool = False
    even: bool = False


def _dual(n_stages: int, t: Times) -> float:
    return (n_stages / 2 - 1) * (t.both + t.backward - 3 * t.weights)


def _there_and_back(n_stages: int, share: float) -> Callable[[int], tuple[StageShare, ...]]:
    def hold(rank: int) -> tuple[StageShare, ...]:
        return StageShare(rank, share, n_stages - rank), StageShare(n_stages - 1 - rank, share, rank + 1)

    return hold


SCHEDULES = {
    "1f1b": Schedule(
        title="1F1B",
        formula="(PP-1)(F+B)",
        bubble=lambda n, t: (n - 1) * (t.forward + t.backward),
        hold=lambda rank, n: (StageShare(rank, 1.0, n - rank),),
    ),
    "zb1p": Schedule(
        title="ZB1P",
        formula="(PP-1)(F+B-2W)",
        bubble=lambda n, t: (n - 1) * (t.forward + t.backward - 2 * t.weights),
        hold=lambda rank, n: (StageShare(rank, 1.0, n),),
    ),
    "dualpipe": Schedule(
        title="DualPipe",
        formula="(PP/2-1)(F&B+B-3W)",
        bubble=_dual,
        hold=lambda rank, n: _there_and_back(n, 0.5)(rank),
        stages_per_device=2,
        copies=2,
        overlaps=True,
        even=True,
    ),
    "dualpipev": Schedule(
        title="DualPipeV",
        formula="(PP/2-1)(F&B+B-3W)",
        bubble=_dual,
        hold=lambda rank, n: _there_and_back(2 * n, 1.0)(rank),
        stages_per_device=2,
        overlaps=True,
    ),
}


def schedule(name: str, n_devices: int, micro_batches: int) -> Schedule:
    """Returns the schedule called `name`, checked against the devices and micro-batches of a pipeline.

    Raises:
        UserError: there is no such schedule, or it does not suit these numbers.
    """
    if name not in SCHEDULES:
        raise UserError(f"--schedule={name}: no such schedule. Choose one of {', '.join(SCHEDULES)}.")
    found = SCHEDULES[name]
    if found.even and n_devices % 2:
        raise UserError(
            f"--schedule={name} with config.mesh.pipe={n_devices}: expected an even number of devices. "
            "Choose an even config.mesh.pipe, or --schedule=1f1b."
        )
    least = 2 * n_devices if found.overlaps else 1
    if micro_batches < least or (found.even and micro_batches % 2):
        expected = f"an even number >= {least}" if found.even else f"{least} or more"
        raise UserError(
            f"--schedule={name} over {n_devices} devices with {micro_batches} micro-batches: expected {expected}. "
            "Choose another config.run.micro_batches, or --schedule=1f1b."
        )
    return found


def n_stages(found: Schedule, n_devices: int) -> int:
    """Returns the number of stages of the pipeline: PP."""
    return n_devices * found.stages_per_device // found.copies

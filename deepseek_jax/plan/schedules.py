"""Pipeline schedules: what each device holds, how many micro-batches are in flight, how long devices wait.

Of one stage and micro-batch let F be the time of the forward pass, B of the whole backward pass, W of the part of it
that makes weight gradients, F&B of a forward and a backward pass overlapped; PP the number of stages.

| schedule | bubble | devices | stages a device | micro-batches in flight |
| --- | --- | --- | --- | --- |
| 1F1B | (PP - 1) (F + B) | PP | 1 | PP on the first, 1 on the last |
| ZB1P | (PP - 1) (F + B - 2W) | PP | 1 | PP |
| DualPipe | (PP/2 - 1) (F&B + B - 3W) | PP | 2, in opposite directions: two copies of the model | PP + 1 |
| DualPipeV | (PP/2 - 1) (F&B + B - 3W) | PP/2 | 2, there and back | PP + 1 |

Sources: V3 report, section 3.2.1 and table 2; the DualPipe repository's README; zero bubble: arXiv 2401.10241.
"""

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_jax.errors import UserError


@dataclass(frozen=True)
class Held:
    """A stage on a device.

    Attributes:
        stage: which.
        share: of a pipeline's micro-batches, those that pass it here.
        in_flight: micro-batches of which it keeps activations at once, at most.
    """

    stage: int
    share: float
    in_flight: int


@dataclass(frozen=True)
class Times:
    """Seconds of one stage and micro-batch.

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
        title, formula: for people.
        bubble: seconds that a device waits in a step, from (PP, times).
        hold: the stages on a device, from (rank, devices along the pipeline).
        stages_per_device: 1 or 2.
        copies: of the model in one pipeline.
        overlaps: whether the forward pass of one micro-batch and the backward pass of another hide their exchanges.
        even: whether the devices along the pipeline must be even in number.
    """

    title: str
    formula: str
    bubble: Callable[[int, Times], float]
    hold: Callable[[int, int], tuple[Held, ...]]
    stages_per_device: int = 1
    copies: int = 1
    overlaps: bool = False
    even: bool = False


def _dual(n_stages: int, t: Times) -> float:
    return (n_stages / 2 - 1) * (t.both + t.backward - 3 * t.weights)


def _there_and_back(n_stages: int, share: float) -> Callable[[int], tuple[Held, ...]]:
    def hold(rank: int) -> tuple[Held, ...]:
        return Held(rank, share, n_stages - rank), Held(n_stages - 1 - rank, share, rank + 1)

    return hold


SCHEDULES = {
    "1f1b": Schedule(
        title="1F1B",
        formula="(PP-1)(F+B)",
        bubble=lambda n, t: (n - 1) * (t.forward + t.backward),
        hold=lambda rank, n: (Held(rank, 1.0, n - rank),),
    ),
    "zb1p": Schedule(
        title="ZB1P",
        formula="(PP-1)(F+B-2W)",
        bubble=lambda n, t: (n - 1) * (t.forward + t.backward - 2 * t.weights),
        hold=lambda rank, n: (Held(rank, 1.0, n),),
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
    """The schedule called `name`, checked against the devices along the pipeline and the micro-batches of each.

    Raises:
        UserError: no such schedule, or one that these do not suit.
    """
    if name not in SCHEDULES:
        raise UserError(f"--schedule={name}: no such schedule. Choose one of {', '.join(SCHEDULES)}.")
    found = SCHEDULES[name]
    if found.even and n_devices % 2:
        raise UserError(
            f"--schedule={name} runs both ways through an even number of devices; config.mesh.pipe={n_devices}. "
            "Choose an even one, or --schedule=1f1b."
        )
    least = 2 * n_devices if found.overlaps else 1
    if micro_batches < least or (found.even and micro_batches % 2):
        wanted = f"an even number, {least} or more" if found.even else f"{least} or more"
        raise UserError(
            f"--schedule={name} over {n_devices} devices with {micro_batches} micro-batches: wanted {wanted}. "
            "Choose another config.train.micro_batches, or --schedule=1f1b."
        )
    return found


def n_stages(found: Schedule, n_devices: int) -> int:
    """Stages of the pipeline: PP."""
    return n_devices * found.stages_per_device // found.copies

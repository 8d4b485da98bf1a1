"""Pipeline schedules: how long devices wait for one another.

For one stage and micro-batch, F is the time of the forward pass, B of the whole backward pass, W of its part that
computes weight gradients, and F&B of a forward and a backward pass overlapped. PP is the number of stages; which of
them a device holds is in `parallel.stages`.

| schedule | bubble |
| --- | --- |
| 1F1B, also with F and B as pairs | (PP - 1) (F + B) |
| ZB1P | (PP - 1) (F + B - 2W) |
| DualPipe, DualPipeV | (PP/2 - 1) (F&B + B - 3W) |

Sources: V3 report, section 3.2.1 and table 2; the DualPipe repository's README; zero bubble: arXiv 2401.10241.
"""

from collections.abc import Callable
from dataclasses import dataclass

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.simulate import Times
from deepseek_jax.parallel.stages import ARRANGEMENTS, Arrangement


@dataclass(frozen=True)
class Schedule:
    """A pipeline schedule."""

    # title, formula: name and formula as shown to people
    title: str
    formula: str
    bubble: Callable[[int, Times], float]  # `bubble(PP, times)` returns the seconds that a device waits per step
    arrangement: Arrangement  # which stages each device holds
    # whether the forward pass of one micro-batch and the backward pass of another hide their exchanges
    overlaps: bool = False


def _one_way(n_stages: int, t: Times) -> float:
    return (n_stages - 1) * (t.forward + t.backward)


def _zero_bubble(n_stages: int, t: Times) -> float:
    return (n_stages - 1) * (t.forward + t.backward - 2 * t.weights)


def _dual(n_stages: int, t: Times) -> float:
    return (n_stages / 2 - 1) * (t.both + t.backward - 3 * t.weights)


SCHEDULES = {
    "1f1b": Schedule("1F1B", "(PP-1)(F+B)", _one_way, ARRANGEMENTS["1f1b"]),
    "1f1b_paired": Schedule("1F1B, paired", "(PP-1)(F+B)", _one_way, ARRANGEMENTS["1f1b_paired"], overlaps=True),
    "zb1p": Schedule("ZB1P", "(PP-1)(F+B-2W)", _zero_bubble, ARRANGEMENTS["zb1p"]),
    "dualpipe": Schedule("DualPipe", "(PP/2-1)(F&B+B-3W)", _dual, ARRANGEMENTS["dualpipe"], overlaps=True),
    "dualpipev": Schedule("DualPipeV", "(PP/2-1)(F&B+B-3W)", _dual, ARRANGEMENTS["dualpipev"], overlaps=True),
}


def schedule(name: str, n_devices: int, micro_batches: int) -> Schedule:
    """Returns the schedule called `name`, checked against the devices and micro-batches of a pipeline.

    Raises UserError if there is no such schedule, or it does not suit these numbers.
    """
    if name not in SCHEDULES:
        raise UserError(f"--schedule={name}: no such schedule. Choose one of {', '.join(SCHEDULES)}.")
    found = SCHEDULES[name]
    if found.arrangement.even and n_devices % 2:
        raise UserError(
            f"--schedule={name} with config.mesh.pipe={n_devices}: expected an even number of devices. "
            "Choose an even config.mesh.pipe, or --schedule=1f1b."
        )
    least = 2 * n_devices if found.overlaps else 1
    if micro_batches < least or (found.arrangement.even and micro_batches % 2):
        expected = f"an even number >= {least}" if found.arrangement.even else f"{least} or more"
        raise UserError(
            f"--schedule={name} over {n_devices} devices with {micro_batches} micro-batches: expected {expected}. "
            "Choose another config.pipeline.micro_batches, or --schedule=1f1b."
        )
    return found


def name_of(planned: Schedule) -> str:
    """Returns the name of a schedule of `SCHEDULES`, as given to --schedule."""
    return next(name for name, known in SCHEDULES.items() if known is planned)

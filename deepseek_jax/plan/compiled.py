"""What XLA says of a training step that was compiled and not run, per device."""

import re
from collections import Counter
from typing import NamedTuple

from deepseek_jax.parallel.traced import Sent

# How XLA calls the collectives of `parallel.traced`.
IN_HLO = {"psum": "all-reduce", "pmax": "all-reduce", "pmin": "all-reduce", "ppermute": "collective-permute"}
NAMES = ("all-to-all", "all-reduce", "all-gather", "reduce-scatter", "collective-permute")


class CompiledStep(NamedTuple):
    """A compiled step; bytes are those of one device."""

    target: str  # see `parallel.targets`
    n_devices: int
    seconds: dict[str, float]  # of each phase of compiling
    peak_bytes: int  # most memory of the process that compiled
    # state: bytes between steps, by entry of the train state; batch: of the samples of a step
    state: dict[str, int]
    batch: int
    # arguments, temporaries, outputs: as XLA says; outputs without those that take an argument's place
    arguments: int
    temporaries: int
    outputs: int
    carried: int  # of the temporaries: carried from turn to turn by the loop over ticks or micro-batches
    sent: list[Sent]  # of the pipeline rank that sends most
    in_hlo: dict[str, int]  # collectives in the compiled program, by XLA's name
    n_instructions: int  # of the compiled program

    @property
    def total(self) -> int:
        """The bytes that a device needs at once."""
        return self.arguments + self.temporaries + self.outputs


def from_json(tree: dict) -> CompiledStep:
    """Returns what `CompiledStep._asdict` and JSON made of one."""
    sent = [Sent(kind, tuple(axes), *numbers) for kind, axes, *numbers in tree["sent"]]
    return CompiledStep(**tree | {"sent": sent})


def read_hlo(text: str) -> tuple[dict[str, int], int]:
    """Returns (collectives by name, all instructions) of a compiled program's text; a pair of start and done is one."""
    found = Counter(re.findall(rf" ({'|'.join(NAMES)})(?:-start)?\(", text))
    return dict(sorted(found.items())), text.count(" = ")

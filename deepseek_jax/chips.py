"""What one chip can do, as its maker states it.

Rates are those of dense matmuls. Links count one direction: what a chip can send while it receives as much. The "fast"
link connects the chips of a host or a slice (NVLink, ICI); the "network" connects those (InfiniBand, DCN); both are per
chip. No chip reaches these numbers: H800's links, for example, reach about 80 % (arXiv 2505.09343, section 4).
"""

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

from deepseek_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One chip."""

    name: str  # as given to --chip
    bf16: float  # TFLOP/s of dense bfloat16 matmuls
    fp8: float  # TFLOP/s of dense FP8 matmuls; equal to `bf16` if the chip has no faster units for them
    memory: float  # GiB
    hbm: float  # GB/s to that memory
    fast: float  # GB/s over the fast link
    reach: int  # number of chips that the fast link connects, this one included
    network: float  # GB/s to all other chips


CHIPS = {
    chip.name: chip
    for chip in (
        # H100 (NVIDIA H100 SXM5 data sheet) with NVLink reduced from 900 to 400 GB/s, both directions together; 8 per
        # host, each with a 400 Gb/s InfiniBand card (V3 section 3.1; arXiv 2505.09343 section 4).
        Chip("h800", bf16=989, fp8=1979, memory=80, hbm=3350, fast=200, reach=8, network=50),
        # NVIDIA H100 SXM5 data sheet: 1,979 and 3,958 with sparsity; NVLink 4, 900 GB/s both ways. DGX H100: 400 Gb/s.
        Chip("h100", bf16=989, fp8=1979, memory=80, hbm=3350, fast=450, reach=8, network=50),
        # NVIDIA H200 SXM data sheet: the same chip, 141 GB at 4.8 TB/s.
        Chip("h200", bf16=989, fp8=1979, memory=141, hbm=4800, fast=450, reach=8, network=50),
        # NVIDIA A100 data sheet, SXM: no FP8; NVLink 3, 600 GB/s both ways. DGX A100: 8 per host, a 200 Gb/s card each.
        Chip("a100", bf16=312, fp8=312, memory=80, hbm=2039, fast=300, reach=8, network=25),
        Chip("a100_40", bf16=312, fp8=312, memory=40, hbm=1555, fast=300, reach=8, network=25),
        # NVIDIA L4 data sheet: 242 and 485 with sparsity; PCIe 4, 64 GB/s both ways. Google Cloud's g2-standard-96:
        # 8 of them share 100 Gb/s.
        Chip("l4", bf16=121, fp8=242.5, memory=24, hbm=300, fast=32, reach=8, network=1.5625),
        # NVIDIA T4 data sheet: 65 in float16 (it has no bfloat16 units: a run in bfloat16 is slower); PCIe 3, 32 GB/s
        # both ways. AWS's g4dn.metal: 8 of them share 100 Gb/s.
        Chip("t4", bf16=65, fp8=65, memory=16, hbm=320, fast=16, reach=8, network=1.5625),
        # An eighth of NVIDIA's DGX B200: 72 PFLOPS FP8 with sparsity, 1,440 GB, 64 TB/s; NVLink 5, 1.8 TB/s both ways.
        Chip("b200", bf16=2250, fp8=4500, memory=180, hbm=8000, fast=900, reach=8, network=50),
        # A 72nd of NVIDIA's GB200 NVL72: 360 PFLOPS in bfloat16, 720 in FP8, both with sparsity; 13.4 TB at 576 TB/s;
        # NVLink 5, 130 TB/s both ways; a 400 Gb/s card each.
        Chip("gb200", bf16=2500, fp8=5000, memory=186, hbm=8000, fast=900, reach=72, network=50),
        # Google Cloud, "TPU v5e": 197 (no FP8 figure), 16 GB at 819 GB/s, ICI 400 GB/s both ways, 256 chips per pod,
        # DCN 6.4 Tb/s per pod.
        Chip("tpu_v5e", bf16=197, fp8=197, memory=16, hbm=819, fast=200, reach=256, network=3.125),
        # Google Cloud, "TPU v5p": 459 in both, 95 GiB at 2,765 GB/s, ICI 1,200 GB/s both ways, DCN 50 Gb/s per chip;
        # the largest slice has 6,144 chips.
        Chip("tpu_v5p", bf16=459, fp8=459, memory=95, hbm=2765, fast=600, reach=6144, network=6.25),
        # Google Cloud, "TPU v6e": 918 (no FP8 figure), 32 GB at 1,638 GB/s, ICI 800 GB/s both ways, 256 chips per
        # pod, DCN 25.6 Tb/s per pod.
        Chip("tpu_v6e", bf16=918, fp8=918, memory=32, hbm=1638, fast=400, reach=256, network=12.5),
    )
}
# Chips by the kind that JAX reports: the first entry that occurs in it holds. A number is TFLOP/s of dense bfloat16
# matmuls, by their makers' data sheets, of chips that the planner does not know.
DEVICE_KINDS: dict[str, str | float] = {
    "H100 PCIe": 756,
    "H100": "h100",
    "H200": "h200",
    "H800": "h800",
    "GB200": "gb200",
    "B200": "b200",
    "A100": "a100",
    "L40S": 362,
    "L40": 181,
    "L4": "l4",
    "T4": "t4",
    "TPU v4": 275,
    "TPU v5 lite": "tpu_v5e",
    "TPU v5e": "tpu_v5e",
    "TPU v5": "tpu_v5p",  # calls itself so
    "TPU v6": "tpu_v6e",
}
# Other names of chips, and how many of the units in a slice's name make one chip: "v5p-512" has 512 TensorCores.
ALIASES = {"a100_80": "a100", "v5e": "tpu_v5e", "v5litepod": "tpu_v5e", "v5p": "tpu_v5p", "v6e": "tpu_v6e"}
UNITS_PER_CHIP = {"tpu_v5p": 2}
NUMBERS = tuple(field.name for field in dataclasses.fields(Chip) if field.name != "name")
LEAST, MOST = 1e-3, 1e9  # bounds of each of these numbers


def chips_of(text: str) -> tuple[Chip, int]:
    """Returns the chip and the number of chips that `text` names, 0 if it names no number.

    | text | chips |
    | --- | --- |
    | h100 | 0 |
    | 8xh100, h100x8, h100-8 | 8 |
    | v6e-256, v5litepod-16 | 256, 16: these slices count chips |
    | v5p-512 | 256: these count TensorCores, two per chip |
    | mine:bf16=989,... | 0; see `chip` |

    Raises UserError if there is no such chip, or the number of TensorCores does not divide evenly into chips.
    """
    found = re.fullmatch(r"(?:(\d+) ?x ?)?([a-z0-9_]*?[a-z0-9])(?:( ?x ?|-)(\d+))?", text.lower())
    if ":" in text or _name(text) or not found or not (found[1] or found[4]) or (found[1] and found[4]):
        return chip(text), 0
    count, named = int(found[1] or found[4]), chip(found[2])
    units = UNITS_PER_CHIP.get(named.name, 1) if found[3] == "-" else 1
    if count < 1 or count % units:
        raise UserError(
            f"--chip={text}: {named.name} slices are named by their TensorCores, of which a chip has {units}. "
            f"Expected a multiple of {units}; or give the chips: --chip={named.name} --devices=N."
        )
    return named, count // units


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a chip by the kind that JAX reports, None if it is unknown (a CPU)."""
    for kind, known in DEVICE_KINDS.items():
        if kind.lower() in device_kind.lower():
            return 1e12 * (CHIPS[known].bf16 if isinstance(known, str) else known)
    return None


def memory_bandwidth(device_kind: str) -> float | None:
    """Returns the bytes per second of a chip's memory by the kind that JAX reports, None if it is unknown (a CPU)."""
    for kind, known in DEVICE_KINDS.items():
        if kind.lower() in device_kind.lower():
            return 1e9 * CHIPS[known].hbm if isinstance(known, str) else None
    return None


def _name(text: str) -> str:
    """Returns the name in `CHIPS` of a chip called `text`, "" if there is none."""
    name = ALIASES.get(text.lower(), text.lower())
    return name if name in CHIPS else ""


def chip(text: str) -> Chip:
    """Returns the chip called `text`, or one given by its numbers: "mine:bf16=989,fp8=1979,memory=80,hbm=3350,…".

    Missing numbers are taken from the chip of that name ("h200:memory=96"), else from H800; `fp8` defaults to twice
    `bf16`. Raises UserError if there is no such chip, or a number is invalid.
    """
    name, colon, numbers = text.partition(":")
    if not colon and _name(name):
        return CHIPS[_name(name)]
    if not colon or not name:
        raise UserError(
            f"--chip={text}: no such chip. Choose one of {', '.join(CHIPS)}, with a number if you like "
            "(8xh100, v5p-512), or give its numbers: "
            "--chip=mine:bf16=989,fp8=1979,memory=80,hbm=3350,fast=200,reach=8,network=50."
        )
    given: dict[str, Any] = {}
    for pair in numbers.split(","):
        key, _, number = pair.partition("=")
        try:
            given[key] = int(number) if key == "reach" else float(number)
        except ValueError:
            given[key] = 0
        if key not in NUMBERS or not LEAST <= given[key] <= MOST:
            expected = f"KEY=NUMBER from {LEAST} to {MOST:g}, with a KEY of {', '.join(NUMBERS)}"
            raise UserError(f"--chip={text}: {pair!r}: expected {expected}.")
    if "bf16" in given and "fp8" not in given:
        given["fp8"] = 2 * given["bf16"]
    return dataclasses.replace(CHIPS.get(_name(name), CHIPS["h800"]), name=name, **given)

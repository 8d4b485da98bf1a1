"""What one chip can do, as its maker states it.

Rates are those of dense matmuls.  Links count one direction: what a chip can send while it receives as much.  "Fast" is
what joins the chips of a host or a slice (NVLink, ICI), "network" what joins those (InfiniBand, DCN), per chip.
No chip reaches these numbers; H800's links, for one, give about four fifths (arXiv 2505.09343, section 4).
"""

import dataclasses
from dataclasses import dataclass

from deepseek_jax.errors import UserError


@dataclass(frozen=True)
class Chip:
    """One chip.

    Attributes:
        name: as given to --chip.
        bf16: TFLOP/s of dense bfloat16 matmuls.
        fp8: of FP8 ones; `bf16` where it has no faster units for them.
        memory: GiB.
        hbm: GB/s to that memory.
        fast: GB/s to the chips nearby.
        reach: how many chips that link joins, this one included.
        network: GB/s to all others.
    """

    name: str
    bf16: float
    fp8: float
    memory: float
    hbm: float
    fast: float
    reach: int
    network: float


CHIPS = {
    chip.name: chip
    for chip in (
        # H100 (NVIDIA H100 SXM5 data sheet) with NVLink cut from 900 to 400 GB/s both ways together; 8 a host, each
        # with a 400 Gb/s InfiniBand card (V3 section 3.1; arXiv 2505.09343 section 4).
        Chip("h800", bf16=989, fp8=1979, memory=80, hbm=3350, fast=200, reach=8, network=50),
        # NVIDIA H100 SXM5 data sheet: 1,979 and 3,958 with sparsity; NVLink 4, 900 GB/s both ways. DGX H100: 400 Gb/s.
        Chip("h100", bf16=989, fp8=1979, memory=80, hbm=3350, fast=450, reach=8, network=50),
        # NVIDIA H200 SXM data sheet: the same chip, 141 GB at 4.8 TB/s.
        Chip("h200", bf16=989, fp8=1979, memory=141, hbm=4800, fast=450, reach=8, network=50),
        # An eighth of NVIDIA's DGX B200: 72 PFLOPS FP8 with sparsity, 1,440 GB, 64 TB/s; NVLink 5, 1.8 TB/s both ways.
        Chip("b200", bf16=2250, fp8=4500, memory=180, hbm=8000, fast=900, reach=8, network=50),
        # Google Cloud, "TPU v5p": 459 in both, 95 GiB at 2,765 GB/s, ICI 1,200 GB/s both ways, DCN 50 Gb/s a chip; the
        # largest slice has 6,144 chips.
        Chip("tpu_v5p", bf16=459, fp8=459, memory=95, hbm=2765, fast=600, reach=6144, network=6.25),
        # Google Cloud, "TPU v6e": 918 (no FP8 figure), 32 GB at 1,638 GB/s, ICI 800 GB/s both ways, 256 chips a pod,
        # DCN 25.6 Tb/s a pod.
        Chip("tpu_v6e", bf16=918, fp8=918, memory=32, hbm=1638, fast=400, reach=256, network=12.5),
    )
}
NUMBERS = tuple(field.name for field in dataclasses.fields(Chip) if field.name != "name")
LEAST, MOST = 1e-3, 1e9  # of any of them


def chip(text: str) -> Chip:
    """The chip called `text`, or one given by its numbers: "mine:bf16=989,fp8=1979,memory=80,hbm=3350,…".

    Numbers that are left out are those of the chip called so ("h200:memory=96"), else H800's; `fp8` is twice `bf16`.

    Raises:
        UserError: no such chip, or a number that is none.
    """
    name, colon, numbers = text.partition(":")
    if not colon and name.lower() in CHIPS:
        return CHIPS[name.lower()]
    if not colon or not name:
        raise UserError(
            f"--chip={text}: no such chip. Choose one of {', '.join(CHIPS)}, or give its numbers: "
            "--chip=mine:bf16=989,fp8=1979,memory=80,hbm=3350,fast=200,reach=8,network=50."
        )
    given = {}
    for pair in numbers.split(","):
        key, _, number = pair.partition("=")
        try:
            given[key] = int(number) if key == "reach" else float(number)
        except ValueError:
            given[key] = 0
        if key not in NUMBERS or not LEAST <= given[key] <= MOST:
            wanted = f"KEY=NUMBER from {LEAST} to {MOST:g}, keys {', '.join(NUMBERS)}"
            raise UserError(f"--chip={text}: {pair!r}: wanted {wanted}.")
    if "bf16" in given and "fp8" not in given:
        given["fp8"] = 2 * given["bf16"]
    return dataclasses.replace(CHIPS.get(name.lower(), CHIPS["h800"]), name=name, **given)

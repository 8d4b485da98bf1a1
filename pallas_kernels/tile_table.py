"""The tile table of a chip: how long each of a kernel's tiles took for each shape that was measured.

`deepseek-jax bench kernels --tune` writes it, the kernels' `tiles.py` read it. A table is a JSON file:

    {"chip": "NVIDIA H200", "processors": 132, "jax": "0.11.2", "date": "2026-11-28",
     "microseconds": {"fp8_matmul": {"4096x7168x2048": {"WIDE": 109.2, "TALL": 115.0}}}}

with a line per operation and shape, and per tiles the median time of a call. A Hopper chip without a table of its own
has that of the H200.
"""

import functools
import json
import re
from pathlib import Path
from typing import NamedTuple

import jax

FOLDER = Path(__file__).with_name("tile_tables")
DEFAULT = "NVIDIA H200"

Shape = tuple[int, ...]
Times = dict[str, dict[Shape, dict[str, float]]]  # operation -> shape -> name of tiles -> microseconds


class Table(NamedTuple):
    """What was measured on a chip."""

    chip: str
    processors: int
    jax: str
    date: str
    microseconds: Times


def file_of(chip: str) -> Path:
    """Returns the file of a chip's table."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "_", chip.lower()).strip("_") + ".json")


@functools.cache
def load(file: Path) -> Table:
    """Returns the table in `file`."""
    fields = json.loads(file.read_text(encoding="utf-8"))
    times = {
        operation: {parsed(shape): by_name for shape, by_name in by_shape.items()}
        for operation, by_shape in fields.pop("microseconds").items()
    }
    return Table(**fields, microseconds=times)


def write(table: Table, file: Path) -> None:
    """Writes a table, a line per operation and shape; the file is replaced in one step."""
    head = {"chip": table.chip, "processors": table.processors, "jax": table.jax, "date": table.date}
    blocks = []
    for operation, by_shape in table.microseconds.items():
        lines = [f"      {json.dumps(text(shape))}: {json.dumps(times)}" for shape, times in by_shape.items()]
        blocks.append(f"    {json.dumps(operation)}: {{\n" + ",\n".join(lines) + "\n    }")
    fields = [f"  {json.dumps(name)}: {json.dumps(value)}" for name, value in head.items()]
    fields.append('  "microseconds": {\n' + ",\n".join(blocks) + "\n  }")
    beside = file.with_name(file.name + ".new")
    file.parent.mkdir(parents=True, exist_ok=True)
    beside.write_text("{\n" + ",\n".join(fields) + "\n}\n", encoding="utf-8")
    beside.replace(file)
    load.cache_clear()


def current() -> Table:
    """Returns the table of the default device's chip, or the H200's where it has none."""
    own = file_of(jax.devices()[0].device_kind)
    return load(own if own.exists() else file_of(DEFAULT))


def text(shape: Shape) -> str:
    """Returns a shape as written in a table: 4096x7168x2048."""
    return "x".join(map(str, shape))


def parsed(shape: str) -> Shape:
    """Returns a shape from how a table writes it."""
    return tuple(int(size) for size in shape.split("x"))

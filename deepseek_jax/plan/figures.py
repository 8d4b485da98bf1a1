"""Tables of numbers with their origin, for people and for programs.

| mark | meaning |
| --- | --- |
| derived | follows from shapes, stated formulas and the chip's data sheet |
| published | a measurement or statement of someone else, copied |
| given | a number from the command line or the config |
| fitted | depends on the recipe's efficiency, calibrated on one measurement (`recipes`) |
| compiled | read from the traced or compiled training step, which did not run |
| derived/published, derived/given | computed from a published or given number |
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_jax import units

DERIVED, PUBLISHED, GIVEN, FITTED, COMPILED = "derived", "published", "given", "fitted", "compiled"
GIB, GIGA = 2**30, 1e9


@dataclass(frozen=True)
class Figure:
    """One number."""

    key: str  # name in JSON, which ends in the unit
    value: float | int | str | bool | list[int] | None  # in JSON
    text: str  # as people read it
    mark: str  # its origin, see above


@dataclass(frozen=True)
class Row:
    """A label, one figure per column of the section, and a remark."""

    label: str
    figures: tuple[Figure, ...]
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of figures."""

    name: str  # its heading
    mark: str = ""  # origin of its figures; "" if each row has its own
    key: str = ""  # name of the object that holds its figures in JSON; "" puts them directly into the section


@dataclass(frozen=True)
class Section:
    """A table."""

    key: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = (Column("value"),)


def column(key: str, title: str, rows: Sequence[tuple[str, Figure, str]]) -> Section:
    """Returns a table with one figure per row: (label, figure, remark)."""
    return Section(key, title, tuple(Row(label, (figure,), note) for label, figure, note in rows))


def as_json(sections: Sequence[Section]) -> dict:
    """Returns the figures as nested dicts with keys that end in the unit, and their marks in the same shape."""
    found: dict[str, dict] = {}
    for section in sections:
        for row in section.rows:
            for column, figure in zip(section.columns, row.figures, strict=True):
                for root, value in (("figures", figure.value), ("marks", figure.mark)):
                    inside = found.setdefault(root, {}).setdefault(section.key, {})
                    (inside.setdefault(column.key, {}) if column.key else inside)[figure.key] = value
    return found


def metric(n: float, unit: str) -> str:
    """Returns a number with its unit, in thousands, millions and so on."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if n >= 10**power:
            return f"{n / 10**power:,.1f} {letter}{unit}"
    return f"{n:,.0f} {unit}"


def seconds(value: float) -> str:
    """Returns a duration in seconds, or in milliseconds below one second."""
    return f"{value:,.3f} s" if value >= 1 or not value else f"{1e3 * value:,.3g} ms"


def percent(value: float) -> str:
    """Returns a percentage as text."""
    return f"{value:.2f} %"


def count(key: str, n: int) -> Figure:
    """Returns a number of parameters as a figure."""
    return Figure(key, n, f"{n / GIGA:,.2f} B" if n >= 1e8 else f"{n / 1e6:,.2f} M", DERIVED)


def plain(key: str, n: int, mark: str = DERIVED) -> Figure:
    """Returns an integer with all its digits as a figure."""
    return Figure(key, n, f"{n:,}", mark)


def gib(name: str, n_bytes: float, mark: str = DERIVED) -> Figure:
    """Returns a number of bytes as a figure; in JSON it is in GiB."""
    return Figure(f"{name}_gib", n_bytes / GIB, units.binary(n_bytes), mark)

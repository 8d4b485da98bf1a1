"""Tables of numbers that say what they are, for people and for programs.

| mark | meaning |
| --- | --- |
| derived | follows from shapes, stated formulas and the chip's data sheet |
| published | somebody's measurement or statement, copied |
| given | a number from the command line or the config |
| fitted | rests on the recipe's efficiency, calibrated with one measurement (`recipes`) |
| derived/published, derived/given | computed from a published or given number |
"""

from collections.abc import Sequence
from dataclasses import dataclass

DERIVED, PUBLISHED, GIVEN, FITTED = "derived", "published", "given", "fitted"
GIB, GIGA = 2**30, 1e9


@dataclass(frozen=True)
class Figure:
    """One number.

    Attributes:
        key: its name in JSON, which ends in its unit.
        value: as JSON holds it.
        text: as people read it.
        mark: see above.
    """

    key: str
    value: float | int | str | bool | None
    text: str
    mark: str


@dataclass(frozen=True)
class Row:
    """A label, a figure for each column of the section, and a remark."""

    label: str
    figures: tuple[Figure, ...]
    note: str = ""


@dataclass(frozen=True)
class Column:
    """A column of figures.

    Attributes:
        name: as people read it.
        mark: of its figures; "" where each row has its own.
        key: where JSON puts them inside their section; "": right there.
    """

    name: str
    mark: str = ""
    key: str = ""


@dataclass(frozen=True)
class Section:
    """A table."""

    key: str
    title: str
    rows: tuple[Row, ...]
    columns: tuple[Column, ...] = (Column("value"),)


def column(key: str, title: str, rows: Sequence[tuple[str, Figure, str]]) -> Section:
    """A table with one figure in each row: (label, figure, remark)."""
    return Section(key, title, tuple(Row(label, (figure,), note) for label, figure, note in rows))


def as_json(sections: Sequence[Section]) -> dict:
    """The figures as nested dicts, numbers by keys that end in their unit, and their marks in the same shape."""
    found: dict[str, dict] = {}
    for section in sections:
        for row in section.rows:
            for column, figure in zip(section.columns, row.figures, strict=True):
                for root, value in (("figures", figure.value), ("marks", figure.mark)):
                    inside = found.setdefault(root, {}).setdefault(section.key, {})
                    (inside.setdefault(column.key, {}) if column.key else inside)[figure.key] = value
    return found


def metric(n: float, unit: str) -> str:
    """A number with its unit, in thousands, millions and so on."""
    for power, letter in ((12, "T"), (9, "G"), (6, "M"), (3, "k")):
        if n >= 10**power:
            return f"{n / 10**power:,.1f} {letter}{unit}"
    return f"{n:,.0f} {unit}"


def binary(n_bytes: float) -> str:
    """Bytes in a unit that suits them."""
    for power, unit in ((3, "GiB"), (2, "MiB"), (1, "KiB")):
        if abs(n_bytes) >= 1024**power:
            return f"{n_bytes / 1024**power:,.2f} {unit}"
    return f"{n_bytes:,.0f} B"


def seconds(value: float) -> str:
    """Seconds, or milliseconds where there are few."""
    return f"{value:,.3f} s" if value >= 1 or not value else f"{1e3 * value:,.3g} ms"


def percent(value: float) -> str:
    """A percentage."""
    return f"{value:.2f} %"


def count(key: str, n: int) -> Figure:
    """A number of parameters."""
    return Figure(key, n, f"{n / GIGA:,.2f} B" if n >= 1e8 else f"{n / 1e6:,.2f} M", DERIVED)


def plain(key: str, n: int, mark: str = DERIVED) -> Figure:
    """A whole number to its last digit."""
    return Figure(key, n, f"{n:,}", mark)


def gib(name: str, n_bytes: float, mark: str = DERIVED) -> Figure:
    """Bytes, in JSON as GiB."""
    return Figure(f"{name}_gib", n_bytes / GIB, binary(n_bytes), mark)

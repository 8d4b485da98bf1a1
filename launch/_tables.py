"""Tables on standard output."""

import sys
from collections.abc import Sequence


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]], right: tuple[str, ...] = ()) -> None:
    """Prints aligned columns, those in `right` to the right: drawn by rich on a terminal wide enough, else plain."""
    if sys.stdout.isatty():
        from rich import box
        from rich.console import Console
        from rich.table import Table

        console, table = Console(), Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
        for name in header:
            table.add_column(name, justify="right" if name in right else "left", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        if console.measure(table, options=console.options.update(width=1000)).minimum <= console.width:
            console.print(table)
            return
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        padded = (
            cell.rjust(width) if name in right else cell.ljust(width)
            for cell, width, name in zip(row, widths, header, strict=True)
        )
        print("  ".join(padded).rstrip())

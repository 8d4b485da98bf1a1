"""Draws docs/v32.svg and docs/v4.svg from the tables of the same names: V3.2 and V4 in miniature, three seeds each.

Of V3.2 the share of the attention's weights that its indexer would keep, while it learns alone and then with the model,
and the held-out loss of that second stage beside the same with dense attention. Of V4 the held-out loss beside V3's.

python docs/draw_twins.py
"""

import csv
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, TOP, GAP = 720, 190, 60, 30, 60
COLOURS = {"warm-up": "#1f77b4", "sparse": "#d62728", "dense": "#444444"}
COLOURS |= {"tiny_v3": "#444444", "tiny_v4": "#d62728", "tiny_v4 by AdamW": "#1f77b4"}

Line = tuple[str, list[tuple[int, float]]]


def lines(table: str, by: str, split: str, column: str, first: int = 1) -> list[Line]:
    """Returns (name, its points from step `first` on) of each name and seed in a table."""
    with open(HERE / table, encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == split and row[column]]
    found = []
    for name, seed in dict.fromkeys((row[by], row["seed"]) for row in rows):
        own = [row for row in rows if (row[by], row["seed"]) == (name, seed) and int(row["step"]) >= first]
        found.append((name, [(int(row["step"]), float(row[column])) for row in own]))
    return found


def after(shown: list[Line], names: tuple[str, ...], steps: int) -> list[Line]:
    """The lines, those of some names later by so many steps."""
    return [(name, [(step + steps * (name in names), y) for step, y in points]) for name, points in shown]


def panel(title: str, shown: list[Line], low: float, high: float, tick: float, top: int) -> list[str]:
    """Returns one chart as SVG elements."""
    steps = max(step for _, points in shown for step, _ in points)

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * step / steps

    def y(value: float) -> float:
        return top + HEIGHT * (high - min(max(value, low), high)) / (high - low)

    parts = [f'<text x="{LEFT}" y="{top - 8}">{title}</text>']
    for number in range(round((high - low) / tick) + 1):
        at = low + number * tick
        parts.append(f'<path d="M{LEFT} {y(at):.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(at) + 4:.1f}" text-anchor="end">{at:.4g}</text>')
    for step in range(0, steps + 1, 100):
        parts.append(f'<text x="{x(step):.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{step}</text>')
    for name, points in shown:
        path = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"/>')
    return parts


def write(name: str, panels: list[tuple[str, list[Line], float, float, float]]) -> None:
    """Writes a picture of charts below each other, and which colour is what."""
    height, parts = TOP + len(panels) * (HEIGHT + GAP), []
    for number, (title, shown, low, high, tick) in enumerate(panels):
        parts += panel(title, shown, low, high, tick, TOP + number * (HEIGHT + GAP))
    for number, key in enumerate(dict.fromkeys(key for _, shown, *_ in panels for key, _ in shown)):
        parts.append(f'<text x="{LEFT + 180 * number}" y="{height - 8}" fill="{COLOURS[key]}">{key}</text>')
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
    style = 'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    (HERE / name).write_text(begin + style + "\n".join(["", *parts, "</svg>", ""]), encoding="utf-8")


def main() -> None:
    """Writes both pictures."""
    recall = [line for line in lines("v32.csv", "stage", "train", "index_recall") if line[0] != "dense"]
    second = [line for line in lines("v32.csv", "stage", "held_out", "bits_per_byte", 0) if line[0] != "warm-up"]
    recalled = "index_recall: the indexer alone, then all weights"
    panels = [(recalled, after(recall, ("sparse",), 300), 0.3, 1.0, 0.1)]
    write("v32.svg", [*panels, ("held-out bits per byte of the second stage", second, 1.6, 1.9, 0.1)])
    learning = lines("v4.csv", "run", "held_out", "bits_per_byte", 100)
    write("v4.svg", [("held-out bits per byte", learning, 1.8, 3.8, 0.4)])


if __name__ == "__main__":
    main()

"""Draws docs/rl.svg from docs/rl.csv: R1-Zero in miniature, right answers and their length over the steps.

Three seeds each of tiny_zero and nano_zero, and one run of nano_zero whose base had read too little to add.

python docs/draw_rl.py
"""

import csv
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, TOP, GAP, STEPS = 720, 170, 60, 30, 50, 120
SMOOTHED = 5  # steps per mean
COLOURS = {"tiny_zero": "#1f77b4", "nano_zero": "#2ca02c", "nano_zero, base of 200 steps": "#999999"}
PANELS = (
    ("accuracy", "share of right answers in training", 1.0, 0.25),
    ("answer_length", "tokens per answer", 16.0, 4.0),
)

Curve = list[tuple[int, float]]


def curves(column: str) -> list[tuple[str, Curve]]:
    """Returns (run, its curve) of each run and seed, means over the last `SMOOTHED` steps."""
    with open(HERE / "rl.csv", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == "train"]
    found = []
    for run, seed in dict.fromkeys((row["run"], row["seed"]) for row in rows):
        points = [(int(row["step"]), float(row[column])) for row in rows if (row["run"], row["seed"]) == (run, seed)]
        windows = (points[max(0, i - SMOOTHED + 1) : i + 1] for i in range(len(points)))
        found.append((run, [(window[-1][0], sum(value for _, value in window) / len(window)) for window in windows]))
    return found


def panel(column: str, title: str, high: float, tick: float, top: int) -> list[str]:
    """Returns one chart as SVG elements."""

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * step / STEPS

    def y(value: float) -> float:
        return top + HEIGHT * (1 - value / high)

    parts = [f'<text x="{LEFT}" y="{top - 8}">{title}, means of {SMOOTHED} steps</text>']
    for number in range(round(high / tick) + 1):
        at = y(number * tick)
        parts.append(f'<path d="M{LEFT} {at:.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{number * tick:g}</text>')
    for step in range(0, STEPS + 1, 20):
        parts.append(f'<text x="{x(step):.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{step}</text>')
    for run, curve in curves(column):
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[run]}" stroke-width="1.5"/>')
    return parts


def main() -> None:
    """Writes the picture."""
    height = TOP + len(PANELS) * (HEIGHT + GAP) + 10
    parts = []
    for number, (column, title, high, tick) in enumerate(PANELS):
        parts += panel(column, title, high, tick, TOP + number * (HEIGHT + GAP))
    for number, (run, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{LEFT + 220 * number}" y="{height - 8}" fill="{colour}">{run}</text>')
    begin = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
    style = 'font-family="sans-serif" font-size="12"><rect width="100%" height="100%" fill="white"/>'
    (HERE / "rl.svg").write_text(begin + style + "\n".join(["", *parts, "</svg>", ""]), encoding="utf-8")


if __name__ == "__main__":
    main()

"""Draws docs/fp8.svg from docs/fp8.csv: training loss of small_v3 in bfloat16 and in FP8, and their difference.

bf16_noise and bf16_rounded are bfloat16 once more, from initial weights that differ by 2^-16 of their size, and that
are rounded to bfloat16: how far apart runs are that differ in next to nothing.

python docs/draw_fp8.py
"""

import csv
from pathlib import Path

HERE = Path(__file__).parent
WIDTH, HEIGHT, LEFT, TOP, GAP = 720, 190, 60, 30, 50
SMOOTHED = 20  # logged steps per mean
COLOURS = {"bf16": "#444444", "bf16_noise": "#999999", "bf16_rounded": "#2ca02c", "fp8": "#1f77b4"}

Curve = list[tuple[int, float]]


def curves() -> dict[str, Curve]:
    """Returns (step, loss) of each run, means over the last `SMOOTHED` logged steps."""
    with open(HERE / "fp8.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    found = {}
    for name in COLOURS:
        points = [(int(row["step"]), float(row[name])) for row in rows if row[name]]
        windows = (points[i : i + SMOOTHED] for i in range(len(points) - SMOOTHED + 1))
        found[name] = [(window[-1][0], sum(loss for _, loss in window) / SMOOTHED) for window in windows]
    return found


def differences(smoothed: dict[str, Curve]) -> dict[str, Curve]:
    """Returns the loss relative to that of bfloat16, percent."""
    base = dict(smoothed["bf16"])
    return {
        name: [(step, 100 * (loss / base[step] - 1)) for step, loss in curve]
        for name, curve in smoothed.items()
        if name != "bf16"
    }


def panel(lines: dict[str, Curve], top: int, low: float, high: float, ticks: list[float], title: str) -> list[str]:
    """Returns one chart as SVG elements."""

    def x(step: float) -> float:
        return LEFT + (WIDTH - LEFT - 20) * step / 2000

    def y(value: float) -> float:
        return top + HEIGHT * (high - min(max(value, low), high)) / (high - low)

    parts = [f'<text x="{LEFT}" y="{top - 8}">{title}</text>']
    for tick in ticks:
        parts.append(f'<path d="M{LEFT} {y(tick):.1f}H{WIDTH - 20}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for step in range(0, 2001, 500):
        parts.append(f'<text x="{x(step):.1f}" y="{top + HEIGHT + 16}" text-anchor="middle">{step}</text>')
    for name, curve in lines.items():
        points = " ".join(f"{x(step):.1f},{y(value):.1f}" for step, value in curve)
        parts.append(f'<polyline points="{points}" fill="none" stroke="{COLOURS[name]}" stroke-width="1.5"/>')
    return parts


def main() -> None:
    """Writes the picture."""
    smoothed, second = curves(), TOP + HEIGHT + GAP
    parts = panel(smoothed, TOP, 0.5, 4.0, [0.5, 1, 2, 3, 4], "loss, mean of 20 logged steps")
    parts += panel(differences(smoothed), second, -3, 3, [-3, -2, -1, 0, 1, 2, 3], "difference from bfloat16, percent")
    for place, (name, colour) in enumerate(COLOURS.items()):
        parts.append(f'<text x="{WIDTH - 150}" y="{TOP + 20 + 18 * place}" fill="{colour}">{name}</text>')
    style = 'font-family="sans-serif" font-size="12"'
    size = f'width="{WIDTH}" height="{second + HEIGHT + 30}"'
    picture = "\n".join([f'<svg xmlns="http://www.w3.org/2000/svg" {size} {style}>', *parts, "</svg>\n"])
    (HERE / "fp8.svg").write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Draws docs/v3.svg: DeepSeek-V3 with the file that holds each part, and one of its MoE blocks opened.

    python docs/draw_v3.py

The picture brings its own background and follows the reader's light or dark colour scheme.
"""

from pathlib import Path

WIDTH, HEIGHT = 960, 640
LIGHT = {
    "page": "#ffffff",
    "box": "#eef3f9",
    "part": "#ffffff",
    "line": "#7a8899",
    "text": "#1c2733",
    "file": "#0b5cad",
}
DARK = {"page": "#12171d", "box": "#1d2630", "part": "#12171d", "line": "#8b99a8", "text": "#e6edf3", "file": "#79b8ff"}


def style(colours: dict[str, str]) -> str:
    """Returns the CSS of one colour scheme."""
    fills = "".join(f".{name}{{fill:{colours[name]}}}" for name in ("page", "text", "file"))
    boxes = "".join(f".{name}{{fill:{colours[name]};stroke:{colours['line']}}}" for name in ("box", "part"))
    return f"{fills}{boxes}.line{{fill:none;stroke:{colours['line']};stroke-width:2}}.tip{{fill:{colours['line']}}}"


def words(x: int, y: int, text: str, kind: str = "text", anchor: str = "start") -> str:
    """Returns one line of text; `kind` is its class."""
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{text}</text>'


def box(x: int, y: int, width: int, height: int, title: str, *lines: tuple[str, str], kind: str = "part") -> str:
    """Returns a box with a title and lines of (class, text) below it, aligned left."""
    frame = f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="8"/>'
    rows = [words(x + 12, y + 24, title, "text bold")]
    rows += [words(x + 12, y + 24 + 20 * (i + 1), text, kind) for i, (kind, text) in enumerate(lines)]
    return "\n".join([frame, *rows])


def arrow(x: int, top: int, bottom: int) -> str:
    """Returns an arrow that points down."""
    tip = f"M{x - 5} {bottom - 8}L{x + 5} {bottom - 8}L{x} {bottom}Z"
    return f'<path class="line" d="M{x} {top}V{bottom - 8}"/><path class="tip" d="{tip}"/>'


def residual(top: int, bottom: int) -> str:
    """Returns the way around a branch, from the stream at `top` to the sum at `bottom`."""
    around = f'<path class="line" d="M650 {top}H346V{bottom}H638"/>'
    plus = f'<circle class="part" cx="650" cy="{bottom}" r="12"/>'
    cross = f'<path class="line" d="M644 {bottom}H656M650 {bottom - 6}V{bottom + 6}"/>'
    return around + plus + cross


def model() -> list[str]:
    """Returns the left column: the whole network, from token ids to the loss."""
    parts = (
        ("Embedding", "layers/embed.py"),
        ("3 dense blocks", "layers/swiglu.py"),
        ("58 MoE blocks", "opened on the right"),
        ("RMSNorm", "layers/norm.py"),
        ("Head: the next token", "layers/embed.py"),
        ("MTP: the token after", "layers/mtp.py"),
        ("Loss", "train/loss.py"),
    )
    drawn = [words(24, 44, "DeepSeek-V3", "text head"), words(274, 44, "models/v3.py", "file", "end")]
    for i, (title, file) in enumerate(parts):
        y = 62 + 82 * i
        kind = "file" if file.endswith(".py") else "text"
        drawn.append(box(24, y, 250, 60, title, (kind, file), kind="box" if kind == "text" else "part"))
        if i + 1 < len(parts):
            drawn.append(arrow(149, y + 60, y + 82))
    return drawn


def block() -> list[str]:
    """Returns the right panel: x + MLA(norm x), then x + MoE(norm x)."""
    attention = (
        ("Latent, eq. 1–5", "512 + 64, cached", "layers/mla.py"),
        ("Queries, eq. 6–9", "positions: RoPE", "layers/rope.py"),
        ("Softmax, eq. 10", "over the past", "layers/attention.py"),
    )
    experts = (
        ("Router, eq. 13–16", "chooses 8 of 256", "layers/router.py"),
        ("Exchange", "between devices", "parallel/alltoall.py"),
        ("Experts", "256 routed, 1 shared", "layers/grouped.py"),
    )
    drawn = ['<path class="line" stroke-dasharray="4 5" d="M274 226L322 62M274 286L322 622"/>']
    drawn.append('<rect class="box" x="322" y="24" width="614" height="598" rx="12"/>')
    drawn.append(words(342, 52, "One MoE block", "text head"))
    drawn.append(words(904, 52, "layers/block.py", "file", "end"))
    for top, title, file, parts in (
        (66, "Multi-head latent attention", "layers/mla.py", attention),
        (338, "DeepSeekMoE, eq. 12", "layers/experts.py", experts),
    ):
        drawn.append(arrow(650, top, top + 28))
        drawn.append(residual(top + 6, top + 248))
        drawn.append(box(370, top + 28, 546, 38, "RMSNorm"))
        drawn.append(words(904, top + 52, "layers/norm.py", "file", "end"))
        drawn.append(arrow(650, top + 66, top + 88))
        drawn.append(box(370, top + 88, 546, 130, title))
        drawn.append(words(904, top + 112, file, "file", "end"))
        for i, (name, what, where) in enumerate(parts):
            lines = ("text small", what), ("file", where)
            drawn.append(box(382 + 178 * i, top + 126, 168, 82, name, *lines, kind="box"))
        drawn.append(f'<path class="line" d="M650 {top + 218}V{top + 236}"/>')
    drawn.append('<path class="line" d="M650 326V338M650 598V622"/>')
    return drawn


def picture() -> str:
    """Returns the SVG."""
    fonts = "text{font:15px system-ui,-apple-system,'Segoe UI',sans-serif}.small{font-size:13px}.bold{font-weight:600}"
    fonts += ".head{font-size:20px;font-weight:600}.file{font:13px ui-monospace,SFMono-Regular,Menlo,monospace}"
    css = f"{fonts}{style(LIGHT)}@media(prefers-color-scheme:dark){{{style(DARK)}}}"
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = "<title>DeepSeek-V3 and one of its MoE blocks, with the file that holds each part</title>"
    page = f'<rect class="page" width="{WIDTH}" height="{HEIGHT}" rx="12"/>'
    return "\n".join([head, title, f"<style>{css}</style>", page, *model(), *block(), "</svg>", ""])


if __name__ == "__main__":
    (Path(__file__).parent / "v3.svg").write_text(picture(), encoding="utf-8")

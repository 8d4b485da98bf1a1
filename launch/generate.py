"""Continue a text with a trained model.

    deepseek-jax generate --workdir=runs/tiny_v3 --prompt="def main("
    echo "def main(" | deepseek-jax generate --max-tokens=100 --temperature=0      # a prompt from standard input

The text appears as it is made; how fast it was goes to standard error. --temperature=0 takes the likeliest token each
time, and the same --seed draws the same text.
"""

import sys
from pathlib import Path

from deepseek_jax.bounds import SEED, STEPS, number, whole
from deepseek_jax.convert import hub
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._continuation import continue_text

FLAGS = {
    "prompt": (str, "-", "text to continue; - reads standard input"),
    "max_tokens": (int, 200, "new tokens at most", whole(1, STEPS)),
    "temperature": (float, 0.8, "0 takes the likeliest token, 1 draws from the model's own share", number(0, 1e6)),
    "top_p": (float, 0.95, "draw from the likeliest tokens that make up this share", number(0, 1)),
    "seed": (int, 0, "the same seed draws the same text", SEED),
}
DEFAULT_WORKDIR = Path("runs") / "tiny_v3"


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False, in_bucket=True)
    workdir = options.workdir or DEFAULT_WORKDIR
    if (
        isinstance(workdir, Path)
        and not workdir.is_dir()
        and not (options.workdir and hub.is_id(workdir) and not workdir.parent.is_dir())
    ):
        raise UserError(f"{workdir}: no such directory. Train first (deepseek-jax train --workdir={workdir}).")
    prompt = read_prompt(options.prompt)
    draw = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    continue_text(workdir, prompt, options.max_tokens, **draw)
    return 0


def read_prompt(words: str) -> str:
    """The prompt itself, or standard input for "-"."""
    if words == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise UserError('no prompt. Give --prompt="def main(", or text on standard input.')
        try:
            words = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise UserError(f"the prompt on standard input is not {error.encoding} text. Convert it first.") from None
    if not words:
        raise UserError('the prompt is empty. Give one character or more, like --prompt="def main(".')
    return words

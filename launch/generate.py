"""Let a trained model go on with a text.

    deepseek-jax generate --workdir=runs/tiny_v3 --prompt="def main("
    echo "def main(" | deepseek-jax generate --max-tokens=100 --temperature=0      # a prompt from standard input

The text appears as it is made; how fast it was goes to standard error.  --temperature=0 takes the likeliest token each
time, and the same --seed draws the same text.
"""

import re
import sys
import time
from pathlib import Path

from deepseek_jax.bounds import SEED, STEPS, number, whole
from deepseek_jax.convert import hub
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options

FLAGS = {
    "prompt": (str, "-", "text to go on from; - reads standard input"),
    "max_tokens": (int, 200, "new tokens at most", whole(1, STEPS)),
    "temperature": (
        float,
        0.8,
        "0 takes the likeliest token, 1 draws from the model's own probabilities",
        number(0, 1e6),
    ),
    "top_p": (float, 0.95, "draw from the likeliest tokens that make up this share", number(0, 1)),
    "seed": (int, 0, "the same seed draws the same text", SEED),
}
DEFAULT_WORKDIR = Path("runs") / "tiny_v3"
CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # what could upset a terminal


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False)
    workdir = options.workdir or DEFAULT_WORKDIR
    if not workdir.is_dir() and not (options.workdir and hub.is_id(workdir) and not workdir.parent.is_dir()):
        raise UserError(f"{workdir}: no such directory. Train first (deepseek-jax train --workdir={workdir}).")
    prompt = read_prompt(options.prompt)

    from deepseek_jax.compat import start_compilation_cache
    from deepseek_jax.language_model import load

    start_compilation_cache("")
    model = load(workdir)
    ids = model.prompt(prompt)
    room = model.n_positions - len(ids)
    if room < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and the model was trained on {model.n_positions}, prompt and answer "
            f"together. Give the end of the text alone (tail -c {model.n_positions // 2}), or train with a larger "
            "--config.data.seq_len."
        )
    write(prompt)
    draw = {"temperature": options.temperature, "top_p": options.top_p, "seed": options.seed}
    begin = time.perf_counter()
    times_s = show(model.stream(ids, min(options.max_tokens, room), **draw), model.tokenizer)
    write("\n")
    print(speed(begin, times_s), file=sys.stderr)
    if len(times_s) == room < options.max_tokens:
        print(f"stopped after {model.n_positions} tokens, as long as those it was trained on", file=sys.stderr)
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


def show(tokens, tokenizer) -> list[float]:
    """Prints the tokens' text as they come; returns when each came."""
    from deepseek_jax.serve.text import TextStream

    text, times_s = TextStream(tokenizer.decode), []
    for token in tokens:
        times_s.append(time.perf_counter())
        write(text.push(token))
    write(text.finish())
    return times_s


def write(text: str, to=None) -> None:
    """Prints a piece at once, on standard output unless another stream is given.

    A terminal gets no control characters, which a byte model may well make.
    """
    to = to or sys.stdout
    encoding = to.encoding or "utf-8"
    text = CONTROL.sub("\ufffd", text) if to.isatty() else text
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True, file=to)


def speed(begin_s: float, times_s: list[float]) -> str:
    """One line: how many tokens, how fast; the first two, which compile, are left out of the rate."""
    line = f"{len(times_s)} tokens, the first after {times_s[0] - begin_s:.1f} s"
    if len(times_s) < 4:
        return line
    return f"{line}, then {(len(times_s) - 2) / max(times_s[-1] - times_s[1], 1e-9):,.0f} tokens/s"

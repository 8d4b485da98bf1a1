"""A model's continuation of a text, written while it is made."""

import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError
from deepseek_jax.storage import Place
from deepseek_jax.streams import printable

if TYPE_CHECKING:
    from deepseek_jax.data.tokenizer import Tokenizer

SAMPLE = "    def __init__(self"  # what the model continues when a run has ended


def continue_text(
    workdir: Place, prompt: str, max_tokens: int, *, temperature: float, top_p: float = 0.95, seed: int = 0
) -> None:
    """Prints a prompt and what the model of `workdir` makes of it; how fast it was goes to standard error.

    Raises UserError if there is no model, or if the prompt is too long for an answer.
    """
    from deepseek_jax.compat import start_compilation_cache
    from deepseek_jax.language_model import load

    start_compilation_cache("")
    model = load(workdir)
    ids = model.prompt(prompt)
    left = model.n_positions - len(ids)
    if left < 1:
        raise UserError(
            f"the prompt has {len(ids)} tokens, and the model was trained on {model.n_positions}, prompt and answer "
            f"together. Give the end of the text alone (tail -c {model.n_positions // 2}), or train with a larger "
            "--config.data.seq_len."
        )
    write(prompt)
    begin = time.perf_counter()
    tokens = model.stream(ids, min(max_tokens, left), temperature=temperature, top_p=top_p, seed=seed)
    times_s = show(tokens, model.tokenizer)
    write("\n")
    print(speed(begin, times_s), file=sys.stderr)
    if len(times_s) == left < max_tokens:
        print(f"stopped after {model.n_positions} tokens, as long as those it was trained on", file=sys.stderr)


def show_sample(config: ConfigDict, workdir: Place) -> None:
    """Prints how to sample from the model, and one sample; that there is none does not fail the run."""
    import jax

    from deepseek_jax.launch._answers import show_answers

    if jax.process_count() > 1:
        return
    if config.data.format == "conversations":
        print(f"talk with it: deepseek-jax chat --workdir={workdir}\n", flush=True)
        try:
            show_answers(config, workdir)
        except UserError as error:
            print(f"no answers: {error}")
        return
    print(f"try it: deepseek-jax generate --workdir={workdir} --prompt='def '\n", flush=True)
    prompt = SAMPLE[: config.data.seq_len // 2] or " "
    try:
        continue_text(workdir, prompt, max_tokens=220, temperature=0.8)
    except UserError as error:
        print(f"no sample: {error}")


def show(tokens: Iterator[int], tokenizer: "Tokenizer") -> list[float]:
    """Prints the tokens' text as they come; returns when each came."""
    from deepseek_jax.serve.text import TextStream

    text, times_s = TextStream(tokenizer.decode), []
    for token in tokens:
        times_s.append(time.perf_counter())
        write(text.push(token))
    write(text.finish())
    return times_s


def write(text: str, to: TextIO | None = None) -> None:
    """Prints a piece at once, on standard output unless another stream is given.

    A terminal gets no control characters, which a byte model may well make.
    """
    to = to or sys.stdout
    encoding = to.encoding or "utf-8"
    text = printable(text) if to.isatty() else text
    print(text.encode(encoding, "replace").decode(encoding), end="", flush=True, file=to)


def speed(begin_s: float, times_s: list[float]) -> str:
    """One line: how many tokens, how fast; the first two, which compile, are left out of the rate."""
    line = f"{len(times_s)} tokens, the first after {times_s[0] - begin_s:.1f} s"
    if len(times_s) < 4:
        return line
    return f"{line}, then {(len(times_s) - 2) / max(times_s[-1] - times_s[1], 1e-9):,.0f} tokens/s"

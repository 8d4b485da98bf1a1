r'''Talk with a model on the terminal, in the chat format it was trained with.

    deepseek-jax chat --from=DeepSeek-R1-Distill-Qwen-1.5B          # a directory of published weights
    deepseek-jax chat --workdir=runs/sft                            # a run that was trained to chat
    printf 'Hello!\nAnd now?\n' | deepseek-jax chat --from=DIR      # one message per line

The answer appears as it is made; a thought is shown dim before it (on standard error where standard output is no
terminal). The model's own chat template is found beside its tokenizer; --template names it where there is none.

    /reset       start a new conversation          /save FILE   write this one to FILE, one line of JSON
    /help        these lines                       /quit        leave (Ctrl-D as well)
    """          begins and ends a message of several lines; pasted lines are one message
    Ctrl-C       stops an answer, which is kept as far as it came (twice: leaves)
'''

import contextlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import TYPE_CHECKING, Any

from deepseek_jax.bounds import SEED, STEPS, number, path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._continuation import write
from deepseek_jax.launch._talking import drawing_of, template_of

if TYPE_CHECKING:
    from deepseek_jax.language_model import LanguageModel
    from deepseek_jax.serve.dialogue import Dialogue
    from deepseek_jax.serve.reply import Piece

FLAGS = {
    "from": (str, "", "directory of published weights, or their id on the hub", path()),
    "template": (str, "", "chat template, where the model's own is not found beside its tokenizer"),
    "system": (str, "", "system prompt"),
    "thinking": (bool, None, "let the prompt open a thought (default: as the model's template does)"),
    "max_tokens": (int, 2048, "new tokens per answer at most", whole(1, STEPS)),
    "temperature": (float, None, "0 takes the likeliest token (default: the model's own, or 0.6)", number(0, 1e6)),
    "top_p": (float, None, "draw from the likeliest tokens of this share (default: likewise, or 0.95)", number(0, 1)),
    "seed": (int, 0, "the same seed and messages draw the same answers", SEED),
}
QUOTES = '"""'
PASTE_S = 0.02  # lines that come faster than this one after the other were pasted
DIM, PLAIN = "\x1b[2m", "\x1b[22m"


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    options = _options.parse(argv, extra=FLAGS, config=False, in_bucket=True)
    source = getattr(options, "from") or options.workdir
    if not source or (getattr(options, "from") and options.workdir):
        raise UserError("expected --from=DIR for published weights, or --workdir=RUN for a run of yours: one of them.")

    from deepseek_jax.compat import start_compilation_cache
    from deepseek_jax.language_model import load

    start_compilation_cache("")
    model = load(source)
    name = template_of(model.config, source, options.template)
    dialogue = open_dialogue(model, name, options)
    terminal = Terminal(options.max_tokens)
    if terminal.is_interactive:
        terminal.note(f"{Path(source).name}, template {name}, {model.n_positions:,} tokens at most. /help for help.")
    terminal.run(dialogue)
    return 0


def open_dialogue(model: "LanguageModel", name: str, options: SimpleNamespace) -> "Dialogue":
    """Returns a `Dialogue` with a model, drawing as the options say."""
    from deepseek_jax.data import chat
    from deepseek_jax.serve.dialogue import Dialogue

    given = {"temperature": options.temperature, "top_p": options.top_p}
    drawing = drawing_of(model.config) | {key: number for key, number in given.items() if number is not None}

    def stream(ids: list[int], **limits: Any) -> Iterator[int]:
        return model.stream(ids, **limits, **drawing, seed=options.seed)

    return Dialogue(
        chat.template(name),
        model.tokenizer,
        stream,
        model.n_positions,
        stop_ids=model.end_ids,
        system=options.system,
        thinking=options.thinking,
    )


class Terminal:
    """Reads messages from standard input and shows answers on standard output.

    `max_tokens` are new tokens per answer at most; `is_interactive` says whether somebody sits at standard input.
    """

    def __init__(self, max_tokens: int):
        self.max_tokens = max_tokens
        self.is_interactive = sys.stdin is not None and sys.stdin.isatty()
        if self.is_interactive:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401  (gives input() its editing keys and its history)
        plain = not sys.stdout.isatty() or os.environ.get("TERM") == "dumb" or "NO_COLOR" in os.environ
        self._dim, self._plain = ("", "") if plain else (DIM, PLAIN)
        self._saved: set[Path] = set()
        self._commands: dict[str, Callable] = {"/help": self._help, "/reset": self._reset, "/save": self._save}

    def run(self, dialogue: "Dialogue") -> None:
        """Talks until there are no more messages. Away from a terminal an error ends it; at one it is printed."""
        for text in self.messages():
            command, _, argument = text.partition(" ")
            if command == "/quit":
                return
            try:
                if command in self._commands:
                    self._commands[command](dialogue, argument.strip())
                elif self.is_interactive and command.startswith("/") and command[1:].isalpha() and not argument:
                    self.note(f"{command}: no such command. Commands: {', '.join(self._commands)}, /quit.")
                else:
                    self.show(dialogue, text)
            except UserError as error:
                if not self.is_interactive:
                    raise
                self.note(str(error))

    def show(self, dialogue: "Dialogue", text: str) -> None:
        """Shows the answer to a message as it comes; Ctrl-C ends it."""
        stopping = _stopping(dialogue) if self.is_interactive else contextlib.nullcontext()
        with contextlib.closing(dialogue.say(text, self.max_tokens)) as pieces, stopping:
            self._paint(pieces)
        endings = {
            "stopped": "(stopped)",
            "max_new_tokens": f"(stopped after {self.max_tokens} tokens: --max-tokens allows more)",
            "n_positions": f"(the conversation has the {dialogue.n_positions} tokens that the model takes: /reset)",
        }
        if dialogue.ending in endings:
            self.note(endings[dialogue.ending])

    def _paint(self, pieces: "Iterator[Piece]") -> None:
        """Writes pieces of an answer, a thought dim and a blank line after it."""
        to_thoughts = sys.stdout if sys.stdout.isatty() else sys.stderr
        to, was_thought, at_line_start = sys.stdout, False, True
        try:
            for piece in pieces:
                if piece.is_thought != was_thought:
                    _style(self._dim if piece.is_thought else self._plain)
                    write("" if piece.is_thought else "\n" if at_line_start else "\n\n", to)
                to, was_thought = to_thoughts if piece.is_thought else sys.stdout, piece.is_thought
                write(piece.text, to)
                at_line_start = piece.text.endswith("\n")
        finally:
            _style(self._plain if was_thought else "")
            write("" if at_line_start else "\n", to)

    def messages(self) -> Iterator[str]:
        """Yields messages and commands until the input ends."""
        while (line := self._line("> ")) is not None:
            if line.strip().startswith(QUOTES):
                line = self._quoted(line.strip().removeprefix(QUOTES))
            pasted: str | None = ""
            while self.is_interactive and pasted is not None and _is_waiting():
                pasted = self._line("")
                line += "" if pasted is None else "\n" + pasted
            if line.strip():
                yield line.strip("\n")
            if pasted is None:
                return

    def _quoted(self, first: str) -> str:
        """Returns the lines up to the one that ends in quotes."""
        lines = [first]
        while not lines[-1].rstrip().endswith(QUOTES) and (line := self._line("… ")) is not None:
            lines.append(line)
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def _line(self, prompt: str) -> str | None:
        """Returns a line without its end, None after the last."""
        if self.is_interactive and not sys.stdout.isatty():  # where input() would write it into the answers
            write(prompt, sys.stderr)
        while True:
            try:
                return input(prompt if self.is_interactive and sys.stdout.isatty() else "")
            except EOFError:
                return None
            except KeyboardInterrupt:
                if not self.is_interactive:
                    raise
                self.note("\n(/quit or Ctrl-D leaves)")
            except UnicodeDecodeError as error:
                raise UserError(f"a message is not {error.encoding} text. Convert it first.") from None

    def note(self, text: str) -> None:
        """Prints a line outside the conversation."""
        print(text, file=sys.stderr, flush=True)

    def _help(self, dialogue: "Dialogue", argument: str) -> None:
        self.note(__doc__.rstrip().rpartition("\n\n")[2])

    def _reset(self, dialogue: "Dialogue", argument: str) -> None:
        dialogue.reset()
        self.note("(a new conversation)")

    def _save(self, dialogue: "Dialogue", argument: str) -> None:
        path = Path(argument).expanduser()
        if not argument:
            raise UserError("expected the name of a file, like /save chat.jsonl.")
        if path.exists() and path not in self._saved:
            raise UserError(f"{path} exists. Give another name.")
        try:
            line = json.dumps({"messages": dialogue.messages}, ensure_ascii=False) + "\n"
            path.write_text(line, encoding="utf-8", errors="replace")
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}). Give another name.") from None
        self._saved.add(path)
        self.note(f"(saved to {path})")


@contextlib.contextmanager
def _stopping(dialogue: "Dialogue") -> Iterator[None]:
    """Ctrl-C stops the answer between two tokens, so that no compilation is torn apart; twice, it leaves at once."""
    is_pressed = False

    def press(signum: int, frame: FrameType | None) -> None:
        nonlocal is_pressed
        if is_pressed:
            raise KeyboardInterrupt
        is_pressed = True
        dialogue.stop()

    before = signal.signal(signal.SIGINT, press)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _style(code: str) -> None:
    """Sends a terminal a code of its own, which `write` would take out."""
    print(code, end="", flush=True)


def _is_waiting() -> bool:
    """Whether another line has come already, as when several are pasted."""
    return bool(select.select([sys.stdin], [], [], PASTE_S)[0])

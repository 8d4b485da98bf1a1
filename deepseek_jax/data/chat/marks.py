"""The special tokens of the templates, as parts of a prompt."""

from typing import NamedTuple

from deepseek_jax.data.tokenizer import FIM


class Part(NamedTuple):
    """A part of a prompt: a special token of the template, or text, in which no special tokens are recognised."""

    text: str
    is_mark: bool


def _mark(spelling: str) -> Part:
    return Part(spelling, True)


BOS, EOS = _mark("<｜begin▁of▁sentence｜>"), _mark("<｜end▁of▁sentence｜>")
EOT = _mark("<|EOT|>")
USER, ASSISTANT = _mark("<｜User｜>"), _mark("<｜Assistant｜>")
THINK, END_THINK = _mark("<think>"), _mark("</think>")
CALLS, END_CALLS = _mark("<｜tool▁calls▁begin｜>"), _mark("<｜tool▁calls▁end｜>")
CALL, END_CALL = _mark("<｜tool▁call▁begin｜>"), _mark("<｜tool▁call▁end｜>")
SEP = _mark("<｜tool▁sep｜>")
OUTPUTS, END_OUTPUTS = _mark("<｜tool▁outputs▁begin｜>"), _mark("<｜tool▁outputs▁end｜>")
OUTPUT, END_OUTPUT = _mark("<｜tool▁output▁begin｜>"), _mark("<｜tool▁output▁end｜>")
DSML = _mark("｜DSML｜")  # inside the tags of V3.2's and V4's calls
REMINDER = _mark("<｜latest_reminder｜>")  # V4's, as are the quick tokens below
ACTION, QUERY, AUTHORITY = _mark("<｜action｜>"), _mark("<｜query｜>"), _mark("<｜authority｜>")
DOMAIN, TITLE, READ_URL = _mark("<｜domain｜>"), _mark("<｜title｜>"), _mark("<｜read_url｜>")
FIM_BEGIN, FIM_HOLE, FIM_END = map(_mark, FIM[0])

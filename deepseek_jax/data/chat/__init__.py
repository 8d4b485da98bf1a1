r"""Chat templates: messages to the text that each generation was trained on, and a model's text back to a message.

    name        models                                       a turn
    v1, v2      LLM chat, Math, MoE; V2 chat, Coder-V2       User: …\n\nAssistant: … EOS
    coder       Coder instruct                               ### Instruction:\n…\n### Response:\n…\n EOT \n
    v2.5        V2.5                                         USER … ASSISTANT … EOS, and tools
    v3-1226     V3 as first published                        the same
    v3          V3-0324                                      the same, with tools in every round
    r1-0120     R1 as first published                        as v3-1226's, with a thought before the answer
    r1-distill  the students of R1                           the same
    r1          R1-0528                                      as v3's, with a thought before the answer
    v31         V3.1, V3.1-Terminus                          the same; each answer opens a thought or closes it

`TEMPLATES[name]` holds three functions and the special token that ends an answer:

    parts(messages, tools=(), thinking=False)  a prompt, up to the assistant's turn; if the last message is the
                                               assistant's, a whole conversation. Thoughts of earlier answers are left
                                               out if the published template leaves them out.
    reply(message, thinking=False)             the assistant's text for `message`, thought included: a target of
                                               training, and the inverse of `parse`
    parse(text, thinking=False)                the assistant's text, with special tokens spelled out, as a message;
                                               never raises

With `thinking` the prompt itself opens the thought with `<think>`.

A prompt is a list of parts, each either text or a special token of the template. `to_ids` recognises special tokens in
the latter only: a user who types `<｜Assistant｜>` has typed thirteen letters. (v1, v2 and coder separate turns by
words that a user can type.) `encode` joins the parts to a string for people to read.

`template_for(folder)` finds the template of a published model from the model's own files.

Sources: the chat_template of each model's tokenizer_config.json, which is followed exactly, and its model card.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepseek_jax.data.chat import first_v3, plain, v3, v31
from deepseek_jax.data.chat.marks import END_THINK, EOS, EOT, THINK, Part
from deepseek_jax.data.chat.parts import NO_SPACES, CallFormat, Spaces, fim_parts, join, spell, to_ids
from deepseek_jax.data.chat.published import published_template, recognise
from deepseek_jax.errors import UserError


@dataclass(frozen=True)
class Template:
    """The chat format of a generation; the functions are explained at the top of this file."""

    parts: Callable[..., list[Part]]
    reply: Callable[..., list[Part]]
    parse: Callable[..., dict]
    end: Part = EOS  # special token at which generation stops
    thinks: bool = False  # whether answers may start with a thought
    opens_thought: bool = False  # whether the published template opens the thought in the prompt (`thinking`)
    spaces: Spaces = NO_SPACES  # blanks of the format around thought and content
    call_format: CallFormat | None = None  # None without tools

    def encode(self, messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> str:
        """Returns the prompt as a string. For a model, use `to_ids(parts(…), tokenizer)`."""
        return spell(self.parts(messages, tools, thinking))


_V2: dict[str, Any] = dict(reply=plain.v2_reply, parse=plain.v2_parse, spaces=plain.V2_SPACES)
_CODER: dict[str, Any] = dict(reply=plain.coder_reply, parse=plain.coder_parse, spaces=plain.CODER_SPACES, end=EOT)
_V3: dict[str, Any] = dict(reply=v3.v3_reply, parse=v3.v3_parse, call_format=v3.CALL_FORMAT)
_R1: dict[str, Any] = dict(_V3, reply=v3.r1_reply, parse=v3.r1_parse, spaces=v3.R1, thinks=True)
_V31: dict[str, Any] = dict(reply=v31.v31_reply, parse=v31.v31_parse, call_format=v31.CALL_FORMAT, thinks=True)

TEMPLATES = {
    "v1": Template(partial(plain.parts, plain.V1), **_V2),
    "v2": Template(partial(plain.parts, plain.V2), **_V2),
    "coder": Template(partial(plain.parts, plain.CODER), **_CODER),
    "v2.5": Template(partial(first_v3.parts, first_v3.V25), **_V3),
    "v3-1226": Template(partial(first_v3.parts, first_v3.V3_1226), **_V3),
    "v3": Template(v3.v3_parts, **_V3),
    "r1-0120": Template(partial(first_v3.parts, first_v3.R1_0120), **_R1, opens_thought=True),
    "r1-distill": Template(partial(first_v3.parts, first_v3.R1_DISTILL), **_R1, opens_thought=True),
    "r1": Template(v3.r1_parts, **_R1),
    "v31": Template(v31.v31_parts, **_V31),
}
OTHER_NAMES = {"v3-0324": "v3", "r1-0528": "r1", "v3.1": "v31", "v3.1-terminus": "v31"}


def template(name: str) -> Template:
    """Returns the template of that name."""
    if OTHER_NAMES.get(name, name) not in TEMPLATES:
        raise UserError(f"chat template {name!r}: expected one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[OTHER_NAMES.get(name, name)]


def template_for(folder: Path | str | None, name: str = "", model: str = "") -> str:
    """Returns the name of the template that a model was trained with.

    It is found in `folder`, that of its tokenizer.json, if there is one; the `name` of a template takes precedence.
    `model` is named in messages, by default the folder. Raises UserError if there is no such template, none in the
    folder (a base model), or an unknown one.
    """
    if name:
        template(name)
        return OTHER_NAMES.get(name, name)
    text = published_template(Path(folder)) if folder else ""
    found, model, names = recognise(text), model or str(folder), ", ".join(TEMPLATES)
    if not text:
        raise UserError(
            f"{model} has no chat template (in chat_template.jinja or tokenizer_config.json): it is a base model and "
            f"continues text: deepseek-jax generate --workdir={model}. If it was trained to chat, name its template "
            f"with --template: {names}."
        )
    if not found:
        raise UserError(
            f"the chat template of {model} is unknown: expected one of DeepSeek's. If the model was trained with "
            f"one of them, name it with --template: {names}."
        )
    return found

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
    v32         V3.2                                         the same, and it thinks between calls, which are DSML
    v4          V4 Flash, V4 Pro                             the same; outputs are the user's, effort, quick tokens

`TEMPLATES[name]` holds three functions and the special token that ends an answer:

    parts(messages, tools=(), thinking=False)  a prompt, up to the assistant's turn; if the last message is the
                                               assistant's, a whole conversation. Thoughts of earlier answers are left
                                               out if the published template leaves them out.
    reply(message, thinking=False)             the assistant's text for `message`, thought included: a target of
                                               training, and the inverse of `parse`
    parse(text, thinking=False)                the assistant's text, with special tokens spelled out, as a message;
                                               never raises

With `thinking` the prompt itself opens the thought with `<think>`. V4's `parts` also take an `effort`; `prompt` passes
it to templates that have one.

A prompt is a list of parts, each either text or a special token of the template. `to_ids` recognises special tokens in
the latter only: a user who types `<｜Assistant｜>` has typed thirteen letters. (v1, v2 and coder separate turns by
words that a user can type.) `encode` joins the parts to a string for people to read.

`template_for(folder)` finds the template of a published model from the model's own files.

Sources: the chat_template of each model's tokenizer_config.json, which is followed exactly, and its model card; for
V3.2 and V4, which have no template, the encoders in their folders.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from deepseek_jax.data.chat import first_v3, plain, v3, v4, v31, v32
from deepseek_jax.data.chat.marks import END_THINK, EOS, EOT, THINK, Part
from deepseek_jax.data.chat.parts import NO_SPACES, CallFormat, Spaces, fim_parts, join, spell, to_ids
from deepseek_jax.data.chat.published import published_name, published_template, recognise
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
    keeps_thoughts: bool = False  # whether prompts repeat thoughts of earlier answers, and may open one after tools
    efforts: tuple[str, ...] = ()  # of thinking, that prompts can ask for
    spaces: Spaces = NO_SPACES  # blanks of the format around thought and content
    call_format: CallFormat | None = None  # of calls between special tokens
    call_block: str = ""  # name of the block of calls in DSML

    @property
    def has_calls(self) -> bool:
        """Whether answers may call tools."""
        return bool(self.call_format or self.call_block)

    def prompt(
        self, messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False, effort: str = ""
    ) -> list[Part]:
        """Returns the prompt; an effort that the template does not write has no effect, as in DeepSeek's API."""
        return self.parts(messages, tools, thinking, **({"effort": effort} if effort in self.efforts else {}))

    def encode(self, messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> str:
        """Returns the prompt as a string. For a model, use `to_ids(parts(…), tokenizer)`."""
        return spell(self.parts(messages, tools, thinking))


_V2: dict[str, Any] = dict(reply=plain.v2_reply, parse=plain.v2_parse, spaces=plain.V2_SPACES)
_CODER: dict[str, Any] = dict(reply=plain.coder_reply, parse=plain.coder_parse, spaces=plain.CODER_SPACES, end=EOT)
_V3: dict[str, Any] = dict(reply=v3.v3_reply, parse=v3.v3_parse, call_format=v3.CALL_FORMAT)
_R1: dict[str, Any] = dict(_V3, reply=v3.r1_reply, parse=v3.r1_parse, spaces=v3.R1, thinks=True)
_V31: dict[str, Any] = dict(reply=v31.v31_reply, parse=v31.v31_parse, call_format=v31.CALL_FORMAT, thinks=True)
_V32: dict[str, Any] = dict(thinks=True, keeps_thoughts=True)

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
    "v32": Template(v32.v32_parts, v32.v32_reply, v32.v32_parse, call_block=v32.BLOCK, **_V32),
    "v4": Template(
        *(v4.v4_parts, v4.v4_reply, v4.v4_parse),
        **(_V32 | dict(call_block=v4.BLOCK, opens_thought=True, efforts=tuple(v4.EFFORTS))),
    ),
}
OTHER_NAMES = {"v3-0324": "v3", "r1-0528": "r1", "v3.1": "v31", "v3.1-terminus": "v31", "v3.2": "v32"}


def template(name: str) -> Template:
    """Returns the template of that name."""
    if OTHER_NAMES.get(name, name) not in TEMPLATES:
        raise UserError(f"chat template {name!r}: expected one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[OTHER_NAMES.get(name, name)]


def is_task(prompt: Sequence[Part]) -> bool:
    """Returns whether a prompt ends in one of V4's quick tokens: its answer is short and has no thought."""
    return bool(prompt) and prompt[-1] in v4.QUICK.values()


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
    found = published_name(Path(folder)) if folder else ""
    model, names = model or str(folder), ", ".join(TEMPLATES)
    if not text and not found:
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

"""Messages to the text that each generation of models was trained on, and a model's text back to a message.

    name   models                                   a turn
    v1     LLM chat, Math instruct, MoE-16B chat    User: …\\n\\nAssistant: … EOS
    v2     V2 chat, V2-Lite chat, Coder-V2          the same, and a system prompt
    coder  Coder instruct                           ### Instruction:\\n…\\n### Response:\\n…\\n EOT \\n
    v3     V2.5, V3, V3-0324                        USER … ASSISTANT … EOS, and tools
    r1     R1, R1-0528, the distilled students      the same, with a thought before the answer
    v31    V3.1, V3.1-Terminus                      the same; each answer opens a thought or closes it

``TEMPLATES[name]`` holds three functions and the mark that ends an answer:

    parts(messages, tools=(), thinking=False)  a prompt, up to where the assistant is to speak; if the assistant spoke
                                               last, a whole conversation.  Thoughts of earlier answers are left out.
    reply(message, thinking=False)             what the assistant is to write there to say ``message``, thought
                                               included: a target of training, and the inverse of ``parse``
    parse(text, thinking=False)                what it wrote, its marks spelled out, as a message; never raises

With ``thinking`` the prompt itself opens the thought with ``<think>``.

A prompt is a list of parts, each either text or a mark of the template.  ``to_ids`` reads marks out of the latter only:
a user who types ``<｜Assistant｜>`` has typed thirteen letters.  (v1, v2 and coder tell turns apart by plain words,
which nothing keeps a user from typing.)  ``encode`` joins the parts to a string, for the eye.

Sources: the chat_template of each model's tokenizer_config.json, and its model card.  Where revisions differ the newer
is followed, and the function says so.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from deepseek_jax.data.messages import (
    Assistant,
    Call,
    Conversation,
    Outputs,
    User,
    as_json,
    as_message,
    functions,
    read,
    read_answer,
)
from deepseek_jax.data.tokenizer import FIM, Tokenizer
from deepseek_jax.errors import UserError


class Part(NamedTuple):
    """A stretch of a prompt: a mark of the template, which is one id, or text, which is never read for marks."""

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
FIM_BEGIN, FIM_HOLE, FIM_END = map(_mark, FIM[0])

Pieces = list[Part | str]  # a bare string is text


def join(pieces: Pieces) -> list[Part]:
    """Returns pieces as parts: neighbouring texts become one, as a tokenizer must see them; empty ones go."""
    parts: list[Part] = []
    for piece in pieces:
        part = piece if isinstance(piece, Part) else Part(piece, False)
        if part.text and not part.is_mark and parts and not parts[-1].is_mark:
            parts[-1] = Part(parts[-1].text + part.text, False)
        elif part.text:
            parts.append(part)
    return parts


def spell(parts: Iterable[Part]) -> str:
    """Returns parts as one string."""
    return "".join(part.text for part in parts)


def to_ids(parts: Iterable[Part], tokenizer: Tokenizer) -> np.ndarray:
    """Returns int32 ids: a mark as its one id, text as text whatever it spells."""
    ids = [np.zeros(0, np.int32)]
    for text, is_mark in parts:
        ids.append(tokenizer.encode(text, specials=is_mark))
        if is_mark and len(ids[-1]) != 1:
            raise UserError(
                f"the tokenizer has no mark {text}, which the chat template needs. "
                "Take the template and the tokenizer of one model."
            )
    return np.concatenate(ids)


# v1, v2: LLM, MoE, V2, Coder-V2.


def v1_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """v2's, without a system prompt: the card says that the models know none (their template would write one)."""
    conversation = _plain("v1", messages, tools, thinking)
    _refuse("v1", system_prompt=conversation.system)
    return _v2(conversation)


def v2_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """BOS system \\n\\n ( User: u \\n\\n Assistant: a EOS )*; a prompt ends in ``Assistant:`` and no blank."""
    return _v2(_plain("v2", messages, tools, thinking))


def _v2(conversation: Conversation) -> list[Part]:
    pieces: Pieces = [BOS, conversation.system and conversation.system + "\n\n"]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += ["User: ", content, "\n\nAssistant:"]
            case Assistant(content):
                pieces += [" ", content, EOS]
    return join(pieces)


def v2_reply(message: dict, thinking: bool = False) -> list[Part]:
    """A blank, the answer, EOS."""
    return join([" ", read_answer(message).content, EOS])


def v2_parse(text: str, thinking: bool = False) -> dict:
    """What precedes EOS, without the blank at its start."""
    return as_message(_before(EOS, text).removeprefix(" "))


def _plain(name: str, messages: Sequence[dict], tools: Sequence[dict], thinking: bool) -> Conversation:
    """Returns messages as a conversation that knows neither tools nor thoughts."""
    conversation = read(messages)
    called = any(isinstance(turn, Assistant) and turn.calls for turn in conversation.turns)
    _refuse(name, tools=tools, tool_calls=called, thinking=thinking)
    return conversation


def _refuse(name: str, **given) -> None:
    """Raises if any of what the generation was not trained on is given."""
    for what, value in given.items():
        if value:
            raise UserError(f"the chat template {name!r} has no {what.replace('_', ' ')}. Leave it out.")


def _before(mark: Part, text: str) -> str:
    return text.partition(mark.text)[0]


# coder: Coder instruct; and the FIM prompts of Coder and later base models.

CODER_SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer"
)


def coder_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """BOS system \\n ( ### Instruction:\\n u \\n### Response:\\n a \\n EOT \\n )*

    Without a system prompt, the published sentence, as the template has it; the README writes "DeepSeek" and ends it
    with a full stop.  After a system prompt of one's own the template sets no line end; here, as in the README, there
    is one.
    """
    conversation = _plain("coder", messages, tools, thinking)
    pieces: Pieces = [BOS, (conversation.system or CODER_SYSTEM).removesuffix("\n"), "\n"]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += ["### Instruction:\n", content, "\n### Response:\n"]
            case Assistant(content):
                pieces += [content, "\n", EOT, "\n"]
    return join(pieces)


def coder_reply(message: dict, thinking: bool = False) -> list[Part]:
    """The answer, a line end, EOT."""
    return join([read_answer(message).content, "\n", EOT])


def coder_parse(text: str, thinking: bool = False) -> dict:
    """What precedes EOT, without the line end before it."""
    return as_message(_before(EOT, text).removesuffix("\n"))


def fim_parts(prefix: str, suffix: str) -> list[Part]:
    """A base model's prompt to fill in the middle, which ends at EOS: Coder, Coder-V2-Lite, V2.5 and V3 share it."""
    return join([BOS, FIM_BEGIN, prefix, FIM_HOLE, suffix, FIM_END])


# v3, r1.


def v3_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """BOS system ( USER u ASSISTANT a EOS )*, and for tools

        ASSISTANT a CALLS CALL function SEP name \\n```json\\n arguments \\n``` END_CALL \\n CALL … END_CALLS EOS
        OUTPUTS OUTPUT o END_OUTPUT \\n OUTPUT … END_OUTPUTS a EOS

    so that after outputs the assistant goes on without a mark.  This is V3-0324's template.  V3's first one reopened no
    block in a second round of calls, and wrote calls only where the content was null.  No template describes the tools;
    V2.5's card does, as JSON in the system prompt.
    """
    _refuse("v3", thinking=thinking)
    return join(_v3(read(messages), tools, keep=lambda content: content))


def r1_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """v3's, but of earlier answers only what follows the last ``</think>``.

    R1-0528 opens the thought itself; R1's card advises to open it with ``<think>\\n``, which is ``thinking``.  This is
    R1-0528's template.  R1's own sets no line ends between outputs, and reopens no block in a second round of calls.
    """
    conversation = read(messages)
    pieces = _v3(conversation, tools, keep=lambda content: content.rpartition(END_THINK.text)[2])
    if thinking:
        _check_user_spoke(conversation)
        pieces += [THINK, "\n"]
    return join(pieces)


def _v3(conversation: Conversation, tools: Sequence[dict], keep: Callable[[str], str]) -> Pieces:
    pieces: Pieces = [BOS, _v3_system(conversation.system, tools)]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += [USER, content, ASSISTANT]
            case Assistant(content, _, calls):
                pieces += [keep(content), *_v3_calls(calls), EOS]
            case Outputs(contents):
                blocks = [piece for content in contents for piece in ("\n", OUTPUT, content, END_OUTPUT)]
                pieces += [OUTPUTS, *blocks[1:], END_OUTPUTS]
    return pieces


def _v3_system(system: str, tools: Sequence[dict]) -> str:
    if not tools:
        return system
    described = [f"- `{f['name']}`:\n```json\n{as_json(f, f['name'], indent=4)}\n```" for f in functions(tools)]
    title = "## Tools\n\n### Function\n\nYou have the following functions available:"
    return "\n\n".join([system or "You are a helpful Assistant.", title, "\n".join(described)])


def _v3_calls(calls: Sequence[Call]) -> Pieces:
    blocks: Pieces = []
    for name, arguments in calls:
        blocks += ["\n", CALL, "function", SEP, f"{name}\n```json\n{arguments}\n```", END_CALL]
    return [CALLS, *blocks[1:], END_CALLS] if calls else []


def _v3_call(body: str) -> Call | None:
    kind, _, call = body.partition(SEP.text)
    name, fence, arguments = call.partition("\n```json\n")
    sound = kind == "function" and name.strip() and fence and arguments.endswith("\n```")
    return Call(name, arguments.removesuffix("\n```")) if sound else None


def v3_reply(message: dict, thinking: bool = False) -> list[Part]:
    """The answer, its calls, EOS."""
    content, _, calls = read_answer(message)
    return join([content, *_v3_calls(calls), EOS])


def v3_parse(text: str, thinking: bool = False) -> dict:
    """What precedes EOS, and the calls at its end."""
    content, calls = _split_calls(_before(EOS, text), _v3_call)
    return as_message(content, calls=calls)


def _split_calls(text: str, read_call: Callable[[str], Call | None]) -> tuple[str, list[Call]]:
    """Returns the content and the calls that end it.

    All or none: unless their block is whole and each of them reads well, they stay in the content, marks and all, so
    that half a call is never run.  Arguments are handed on as written, be they JSON or not.
    """
    content, _, block = text.partition(CALLS.text)
    block, end, rest = block.partition(END_CALLS.text)
    blank, *bodies = (body.strip() for body in block.split(CALL.text))
    calls = [read_call(body.removesuffix(END_CALL.text)) for body in bodies if body.endswith(END_CALL.text)]
    whole = end and bodies and not blank and not rest.strip() and len(calls) == len(bodies) and None not in calls
    return (content, calls) if whole else (text, [])


def r1_reply(message: dict, thinking: bool = False) -> list[Part]:
    """``<think>\\n`` (unless the prompt has it), the thought, ``\\n</think>\\n\\n``, the answer, its calls, EOS."""
    content, thought, calls = read_answer(message)
    opening: Pieces = [] if thinking else [THINK, "\n"]
    thoughts: Pieces = [*opening, thought, "\n", END_THINK, "\n\n"] if thought or thinking else []
    return join([*thoughts, content, *_v3_calls(calls), EOS])


def r1_parse(text: str, thinking: bool = False) -> dict:
    """As v3's, after the thought; a thought that never ends is all there is."""
    text, thought = _before(EOS, text), ""
    blank, mark, rest = text.partition(THINK.text)
    if mark and not blank.strip():
        text, thinking = rest.removeprefix("\n"), True
    if thinking or END_THINK.text in text:  # the latter: the caller forgot that the prompt opened it
        thought, _, text = text.partition(END_THINK.text)
        text = text.removeprefix("\n\n")
    content, calls = _split_calls(text, _v3_call)
    return as_message(content, thought.removesuffix("\n"), calls)


def _check_user_spoke(conversation: Conversation) -> None:
    """Raises if a thought is to be opened where none is: after tool outputs, or with nothing left to say."""
    if not isinstance(conversation.turns[-1], User):
        raise UserError("thinking = True, but the last message is not the user's. Set thinking = False.")


# v31.


def v31_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """BOS system ( USER u ASSISTANT </think> a EOS )*; with ``thinking`` the prompt ends in ``<think>`` instead.

        ASSISTANT </think> a CALLS CALL name SEP arguments END_CALL CALL … END_CALLS EOS
        OUTPUT o END_OUTPUT OUTPUT … a EOS

    Of earlier answers what follows the first ``</think>`` is kept.  Tools and thinking exclude each other (the card).
    """
    conversation = read(messages)
    if thinking:
        _check_user_spoke(conversation)
        _refuse("v31", tools_while_thinking=tools)
    pieces: Pieces = [BOS, conversation.system, *_v31_tools(tools)]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += [USER, content, ASSISTANT, END_THINK]
            case Assistant(content, _, calls):
                thought, end, answer = content.partition(END_THINK.text)
                pieces += [answer if end else thought, *_v31_calls(calls), EOS]
            case Outputs(contents):
                pieces += [piece for content in contents for piece in (OUTPUT, content, END_OUTPUT)]
    return join([*pieces[:-1], THINK] if thinking else pieces)


def _v31_tools(tools: Sequence[dict]) -> Pieces:
    """The tools as the card describes them; the marks in the description are marks."""
    if not tools:
        return []
    described = ""
    for f in functions(tools):
        parameters = as_json(f.get("parameters") or {}, f["name"])
        described += f"### {f['name']}\nDescription: {f.get('description') or ''}\n\nParameters: {parameters}\n\n"
    return [
        "\n\n## Tools\nYou have access to the following tools:\n\n",
        described,
        "IMPORTANT: ALWAYS adhere to this exact format for tool use:\n",
        *(CALLS, CALL, "tool_call_name", SEP, "tool_call_arguments", END_CALL, "{additional_tool_calls}", END_CALLS),
        "\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces",
    ]


def _v31_calls(calls: Sequence[Call]) -> Pieces:
    blocks = [piece for name, arguments in calls for piece in (CALL, name, SEP, arguments, END_CALL)]
    return [CALLS, *blocks, END_CALLS] if calls else []


def _v31_call(body: str) -> Call | None:
    name, sep, arguments = body.partition(SEP.text)
    return Call(name, arguments) if name.strip() and sep else None


def v31_reply(message: dict, thinking: bool = False) -> list[Part]:
    """With ``thinking`` the thought and ``</think>``; the answer, its calls, EOS."""
    content, thought, calls = read_answer(message)
    return join([*([thought, END_THINK] if thinking else []), content, *_v31_calls(calls), EOS])


def v31_parse(text: str, thinking: bool = False) -> dict:
    """As v3's; with ``thinking`` after the thought, and a thought that never ends is all there is."""
    text, thought = _before(EOS, text), ""
    if thinking:
        thought, _, text = text.partition(END_THINK.text)
    content, calls = _split_calls(text, _v31_call)
    return as_message(content, thought, calls)


@dataclass(frozen=True)
class Template:
    """How a generation chats; what the functions do is told at the top of this file."""

    parts: Callable[..., list[Part]]
    reply: Callable[..., list[Part]]
    parse: Callable[..., dict]
    end: Part = EOS  # its id is where generation stops

    def encode(self, messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> str:
        """Returns the prompt as a string.  For a model, take ``to_ids(parts(…), tokenizer)``."""
        return spell(self.parts(messages, tools, thinking))


TEMPLATES = {
    "v1": Template(v1_parts, v2_reply, v2_parse),
    "v2": Template(v2_parts, v2_reply, v2_parse),
    "coder": Template(coder_parts, coder_reply, coder_parse, end=EOT),
    "v3": Template(v3_parts, v3_reply, v3_parse),
    "r1": Template(r1_parts, r1_reply, r1_parse),
    "v31": Template(v31_parts, v31_reply, v31_parse),
}


def template(name: str) -> Template:
    """Returns the template of that name."""
    if name not in TEMPLATES:
        raise UserError(f"there is no chat template {name!r}. Choose one of {', '.join(TEMPLATES)}.")
    return TEMPLATES[name]

r"""V3-0324, and R1-0528, which thinks before it answers.

    BOS system ( USER u ASSISTANT a EOS )*, and for tools
    ASSISTANT a CALLS CALL function SEP name \n```json\n arguments \n``` END_CALL \n CALL … END_CALLS EOS
    OUTPUTS OUTPUT o END_OUTPUT \n OUTPUT … END_OUTPUTS a EOS

so after outputs the assistant continues without a special token. Of earlier answers R1 keeps the text after the last
`</think>`. No template describes the tools; V2.5's card does, as JSON in the system prompt.
"""

from collections.abc import Callable, Sequence

from deepseek_jax.data.chat import marks
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.parts import CallFormat, Pieces, Spaces, before, join
from deepseek_jax.data.chat.refusals import check_user_spoke, refuse
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

R1 = Spaces(before_thought="\n", after_thought="\n", before_content="\n\n")


def v3_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns V3-0324's prompt."""
    refuse("v3", thinking=thinking)
    return join(_pieces(read(messages), tools, keep=str))


def r1_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns R1-0528's prompt. The model opens the thought, or with `thinking` the prompt, as in R1's card."""
    return join(_pieces(read(messages), tools, keep=after_thought) + opening(messages, thinking))


def after_thought(content: str) -> str:
    """Returns the part of an answer after its thought."""
    return content.rpartition(marks.END_THINK.text)[2]


def opening(messages: Sequence[dict], thinking: bool) -> Pieces:
    """Returns the end of a prompt that opens the thought, if it does."""
    if thinking:
        check_user_spoke(messages)
    return [marks.THINK, "\n"] if thinking else []


def _pieces(conversation: Conversation, tools: Sequence[dict], keep: Callable[[str], str]) -> Pieces:
    pieces: Pieces = [marks.BOS, system_and_tools(conversation.system, tools)]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += [marks.USER, content, marks.ASSISTANT]
            case Assistant(content, _, calls):
                pieces += [keep(content), *_calls(calls), marks.EOS]
            case Outputs(contents):
                blocks = [piece for content in contents for piece in ("\n", marks.OUTPUT, content, marks.END_OUTPUT)]
                pieces += [marks.OUTPUTS, *blocks[1:], marks.END_OUTPUTS]
    return pieces


def system_and_tools(system: str, tools: Sequence[dict]) -> str:
    """Returns the system prompt, followed by any tools as V2.5's card describes them."""
    if not tools:
        return system
    described = [f"- `{f['name']}`:\n```json\n{as_json(f, f['name'], indent=4)}\n```" for f in functions(tools)]
    title = "## Tools\n\n### Function\n\nYou have the following functions available:"
    return "\n\n".join([system or "You are a helpful Assistant.", title, "\n".join(described)])


def write_call(call: Call) -> Pieces:
    """Returns CALL function SEP name arguments END_CALL."""
    return [marks.CALL, "function", marks.SEP, f"{call.name}\n```json\n{call.arguments}\n```", marks.END_CALL]


def _calls(calls: Sequence[Call]) -> Pieces:
    blocks = [piece for call in calls for piece in ("\n", *write_call(call))]
    return [marks.CALLS, *blocks[1:], marks.END_CALLS] if calls else []


def _begun_call(body: str) -> Call | None:
    kind, _, call = body.lstrip().partition(marks.SEP.text)
    name, fence, arguments = call.partition("\n```json\n")
    return Call(name, arguments) if kind == "function" and name.strip() and fence else None


CALL_FORMAT = CallFormat(_begun_call, after_arguments="\n```")


def v3_reply(message: dict, thinking: bool = False) -> list[Part]:
    """Returns the answer, its calls, EOS."""
    content, _, calls = read_answer(message)
    return join([content, *_calls(calls), marks.EOS])


def v3_parse(text: str, thinking: bool = False) -> dict:
    """Returns the text before EOS and the calls at its end as a message."""
    content, calls = split_calls(before(marks.EOS, text), CALL_FORMAT)
    return as_message(content, calls=calls)


def split_calls(text: str, call_format: CallFormat) -> tuple[str, list[Call]]:
    """Returns the content and the calls at its end.

    All or none: unless their block is complete and every call is valid, they stay in the content, special tokens
    included, so that half a call is never run. Arguments are passed on as written, even if they are not JSON.
    """
    content, _, block = text.partition(marks.CALLS.text)
    block, end, rest = block.partition(marks.END_CALLS.text)
    blank, *bodies = (body.strip() for body in block.split(marks.CALL.text))
    found = [
        call_format.read(body.removesuffix(marks.END_CALL.text))
        for body in bodies
        if body.endswith(marks.END_CALL.text)
    ]
    calls = [call for call in found if call]
    whole = end and bodies and not blank and not rest.strip() and len(calls) == len(bodies)
    return (content, calls) if whole else (text, [])


def r1_reply(message: dict, thinking: bool = False) -> list[Part]:
    r"""Returns `<think>\n` (unless it is in the prompt), thought, `\n</think>\n\n`, answer, calls, EOS."""
    content, thought, calls = read_answer(message)
    mark: Pieces = [] if thinking else [marks.THINK, R1.before_thought]
    thoughts: Pieces = [*mark, thought, R1.after_thought, marks.END_THINK, R1.before_content]
    return join([*(thoughts if thought or thinking else []), content, *_calls(calls), marks.EOS])


def r1_parse(text: str, thinking: bool = False) -> dict:
    """Returns the thought, then what `v3_parse` returns; a thought that never ends is the whole message."""
    text, thought = before(marks.EOS, text), ""
    blank, mark, rest = text.partition(marks.THINK.text)
    if mark and not blank.strip():
        text, thinking = rest.removeprefix(R1.before_thought), True
    if (
        thinking or marks.END_THINK.text in text
    ):  # in the second case the prompt opened it, although `thinking` is False
        thought, _, text = text.partition(marks.END_THINK.text)
        text = text.removeprefix(R1.before_content)
    content, calls = split_calls(text, CALL_FORMAT)
    return as_message(content, thought.removesuffix(R1.after_thought), calls)

"""V3.1 and V3.1-Terminus, in which each answer opens a thought or closes it.

    BOS system ( USER u ASSISTANT </think> a EOS )*, and for tools
    ASSISTANT </think> a CALLS CALL name SEP arguments END_CALL CALL … END_CALLS EOS
    OUTPUT o END_OUTPUT OUTPUT … a EOS

Of an earlier answer the text after the first `</think>` is kept; all of it if it has calls or follows outputs.
"""

from collections.abc import Sequence

from deepseek_jax.data.chat import marks
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.parts import CallFormat, Pieces, before, join
from deepseek_jax.data.chat.refusals import check_user_spoke, refuse
from deepseek_jax.data.chat.v3 import split_calls
from deepseek_jax.data.messages import (
    Assistant,
    Call,
    Outputs,
    User,
    as_json,
    as_message,
    functions,
    read,
    read_answer,
)


def v31_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns V3.1's prompt; with `thinking` it ends in `<think>`, and tools are not allowed (the model's card)."""
    conversation = read(messages)
    if thinking:
        check_user_spoke(messages)
        refuse("v31", tools_while_thinking=tools)
    pieces: Pieces = [marks.BOS, conversation.system, *_tools(tools)]
    last = None
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += [marks.USER, content, marks.ASSISTANT, marks.END_THINK]
            case Assistant(content, _, calls) if calls or isinstance(last, Outputs):
                pieces += [content, *_calls(calls), marks.EOS]
            case Assistant(content):
                thought, end, answer = content.partition(marks.END_THINK.text)
                pieces += [answer if end else thought, marks.EOS]
            case Outputs(contents):
                pieces += [piece for content in contents for piece in (marks.OUTPUT, content, marks.END_OUTPUT)]
        last = turn
    return join([*pieces[:-1], marks.THINK] if thinking else pieces)


def _tools(tools: Sequence[dict]) -> Pieces:
    """Returns the tools as the card describes them, including the special tokens in the description."""
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
        *(marks.CALLS, marks.CALL, "tool_call_name", marks.SEP, "tool_call_arguments", marks.END_CALL),
        *("{additional_tool_calls}", marks.END_CALLS),
        "\n\nWhere:\n"
        "- `tool_call_name` must be an exact match to one of the available tools\n"
        "- `tool_call_arguments` must be valid JSON that strictly follows the tool's Parameters Schema\n"
        "- For multiple tool calls, chain them directly without separators or spaces",
    ]


def _calls(calls: Sequence[Call]) -> Pieces:
    blocks: Pieces = [
        piece for name, arguments in calls for piece in (marks.CALL, name, marks.SEP, arguments, marks.END_CALL)
    ]
    return [marks.CALLS, *blocks, marks.END_CALLS] if calls else []


def _begun_call(body: str) -> Call | None:
    name, sep, arguments = body.lstrip().partition(marks.SEP.text)
    return Call(name, arguments) if name.strip() and sep else None


CALL_FORMAT = CallFormat(_begun_call)


def v31_reply(message: dict, thinking: bool = False) -> list[Part]:
    """Returns the thought and `</think>` with `thinking`, then the answer, its calls, EOS."""
    content, thought, calls = read_answer(message)
    thoughts: Pieces = [thought, marks.END_THINK] if thinking else []
    return join([*thoughts, content, *_calls(calls), marks.EOS])


def v31_parse(text: str, thinking: bool = False) -> dict:
    """Returns what `v3_parse` does; with `thinking` also the thought, which is everything if it never ends."""
    text, thought = before(marks.EOS, text), ""
    if thinking:
        thought, _, text = text.partition(marks.END_THINK.text)
    content, calls = split_calls(text, CALL_FORMAT)
    return as_message(content, thought, calls)

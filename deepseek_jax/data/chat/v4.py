r"""V4, whose tool results are a part of the user's turn; its calls are DSML (`dsml`).

    BOS effort system ( REMINDER r )? ( USER u ASSISTANT <think> t </think> a EOS )*, and for tools
    USER u ASSISTANT <think> t </think> a \n\n<DSMLtool_calls> … </DSMLtool_calls> EOS
    USER <tool_result>o</tool_result> \n\n <tool_result>o</tool_result> \n\n u ASSISTANT <think> t </think> a EOS

Without thinking, `</think>` stands in the place of `<think> t </think>`. With thinking and tools, every answer keeps
its thought; without tools only those after the last turn of the user keep theirs, and the others are written as if they
had been given without. Tool results count as the user's turn, in the order of their calls.

An `effort` of "max" is asked for in front of everything, if the model thinks. A user's message with a `task` ends in
one of the quick tokens, and its answer is short and has no thought. A developer's message stands where a user's does.
It may have tools and the form of the answer with it; if no message has tools and the model thinks, it is left out once
it is no longer the last.
"""

from collections.abc import Sequence

from deepseek_jax.data.chat import marks
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.parts import Pieces, join
from deepseek_jax.data.chat.v32 import last_of_user, parse, without_developers, written, written_form, written_tools
from deepseek_jax.data.messages import (
    TASKS,
    V4_ORDER,
    Assistant,
    Developer,
    Outputs,
    Reminder,
    Turn,
    User,
    read,
    read_answer,
)

BLOCK = "tool_calls"
TOOLS = (
    """## Tools

You have access to a set of tools to help answer the user's question. You can invoke tools by writing a \
"<｜DSML｜tool_calls>" block like the following:

<｜DSML｜tool_calls>
<｜DSML｜invoke name="$TOOL_NAME">
<｜DSML｜parameter name="$PARAMETER_NAME" string="true|false">$PARAMETER_VALUE</｜DSML｜parameter>
...
</｜DSML｜invoke>
<｜DSML｜invoke name="$TOOL_NAME2">
...
</｜DSML｜invoke>
</｜DSML｜tool_calls>

String parameters should be specified as is and set `string="true"`. For all other types (numbers, booleans, arrays, \
objects), pass the value in JSON format and set `string="false"`.

If thinking_mode is enabled (triggered by <think>), you MUST output your complete reasoning inside <think>...</think> \
BEFORE any tool calls or final response.

Otherwise, output directly after </think> with tool calls or final response.

### Available Tool Schemas

""",
    """

You MUST strictly follow the above defined tool name and parameter schemas to invoke tool calls.
""",
)
EFFORTS = {
    "max": "Reasoning Effort: Absolute maximum with no shortcuts permitted.\n"
    "You MUST be very thorough in your thinking and comprehensively decompose the problem to resolve the root cause, "
    "rigorously stress-testing your logic against all potential paths, edge cases, and adversarial scenarios.\n"
    "Explicitly write out your entire deliberation process, documenting every intermediate step, considered "
    "alternative, and rejected hypothesis to ensure absolutely no assumption is left unchecked.\n\n"
}
QUICK = dict(
    zip(TASKS, (marks.ACTION, marks.QUERY, marks.AUTHORITY, marks.DOMAIN, marks.TITLE, marks.READ_URL), strict=True)
)


def v4_parts(
    messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False, effort: str = ""
) -> list[Part]:
    """Returns V4's prompt; it ends in `<think>`, in `</think>`, or in the quick token of a task."""
    conversation = read(messages, "".join, V4_ORDER)
    turns = _merged(conversation.turns)
    keeps = bool(tools) or any(isinstance(turn, Developer) and turn.tools for turn in turns)
    if thinking and not keeps:
        turns = without_developers(turns)
    last = last_of_user(turns)
    pieces: Pieces = [marks.BOS, EFFORTS.get(effort, "") if thinking else "", conversation.system]
    pieces += written_tools(TOOLS, tools)
    for n, turn in enumerate(turns):
        thinks = thinking and (keeps or n >= last)
        opening = marks.THINK if thinks else marks.END_THINK
        match turn:
            case Reminder(content):
                pieces += [marks.REMINDER, content]
            case User(content, "action"):
                mark = marks.THINK if thinking else marks.END_THINK
                pieces += [marks.USER, content, marks.ASSISTANT, mark, marks.ACTION]
            case User(content, task) if task:
                pieces += [marks.USER, content, QUICK[task]]
            case User(content):
                pieces += [marks.USER, content, marks.ASSISTANT, opening]
            case Developer(content, its_tools, form):
                said = [content, *written_tools(TOOLS, its_tools), *written_form(form)]
                pieces += [marks.USER, *said, marks.ASSISTANT, opening]
            case Assistant():
                pieces += written(turn, BLOCK, thinks and not _has_task(turns[:n]))
    return join(pieces)


def _has_task(before: Sequence[Turn]) -> bool:
    return bool(before) and isinstance(before[-1], User) and bool(before[-1].task)


def _merged(turns: Sequence[Turn]) -> list[Turn]:
    """Returns turns in which results and what the user says after them are one turn of the user."""
    found: list[Turn] = []
    for turn in turns:
        said: Turn = turn
        if isinstance(turn, Outputs):
            said = User("\n\n".join(f"<tool_result>{content}</tool_result>" for content in turn.contents))
        before = found[-1] if found else None
        if isinstance(said, User) and isinstance(before, User):
            found[-1] = said._replace(content=f"{before.content}\n\n{said.content}")
        else:
            found.append(said)
    return found


def v4_reply(message: dict, thinking: bool = False) -> list[Part]:
    """Returns the thought and `</think>` with `thinking`, then the answer, its calls, EOS."""
    return join(written(read_answer(message), BLOCK, thinking))


def v4_parse(text: str, thinking: bool = False) -> dict:
    """Returns the text before EOS, and the calls at its end, as a message; see `v32.parse`."""
    return parse(text, BLOCK, thinking)

r"""The first templates with tools, as they were published: V2.5, the first V3, the first R1 and R1's students.

    v2.5, v3-1226, r1-distill   ASSISTANT CALLS CALL … END_CALL            one call
                                … \n CALL … END_CALL END_CALLS EOS         each further call
    r1-0120                     ASSISTANT a CALLS CALL … END_CALL \n CALL … END_CALL END_CALLS EOS
    all                         OUTPUTS OUTPUT o END_OUTPUT … END_OUTPUTS a EOS

They remember for a whole conversation that a block was opened: a second round of calls starts with a line break instead
of `ASSISTANT CALLS`, and its outputs have no OUTPUTS. The models' later templates (`v3.py`) close and open every block.
Text beside calls, which these templates would silently omit, is rejected.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepseek_jax.data.chat import marks
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.parts import Pieces, join
from deepseek_jax.data.chat.refusals import refuse
from deepseek_jax.data.chat.v3 import after_thought, opening, system_and_tools, write_call
from deepseek_jax.data.messages import Assistant, Call, Outputs, User, read
from deepseek_jax.errors import UserError


class Layout(NamedTuple):
    """The differences between these templates."""

    name: str
    # `write_calls(content, calls, whether there were calls before)` returns pieces
    write_calls: Callable[[str, Sequence[Call], bool], Pieces]
    between_outputs: str = "\n"  # text before each output except the first
    join_system: Callable[[list[str]], str] = "\n\n".join  # joins several system prompts
    blanks: int = 0  # blanks before BOS per system prompt
    thinks: bool = False  # whether a prompt may open a thought; then earlier answers are written without theirs


def _calls_alone(content: str, calls: Sequence[Call], is_later: bool) -> Pieces:
    """Returns V2.5's calls, without content. Every call ends the block, except the very first."""
    if content:
        raise UserError(
            "a message has content and tool_calls: this chat template writes only one of them. Set content to None, or "
            "use the template 'v3' or 'r1', which write both."
        )
    first, *others = [write_call(call) for call in calls]
    pieces: Pieces = ["\n", *first, marks.END_CALLS, marks.EOS] if is_later else [marks.ASSISTANT, marks.CALLS, *first]
    return pieces + [piece for call in others for piece in ("\n", *call, marks.END_CALLS, marks.EOS)]


def _calls_after_content(content: str, calls: Sequence[Call], is_later: bool) -> Pieces:
    """Returns R1's calls: with content in the first round, alone in later ones."""
    if content and is_later:
        raise UserError(
            "a message has content and tool_calls after an earlier round of calls: the chat template 'r1-0120' writes "
            "only the calls. Set content to None, or use the template 'r1', which writes both."
        )
    blocks = [piece for call in calls for piece in ("\n", *write_call(call))]
    return [*(blocks if is_later else [marks.ASSISTANT, content, marks.CALLS, *blocks[1:]]), marks.END_CALLS, marks.EOS]


def _last(prompts: list[str]) -> str:
    return prompts[-1] if prompts else ""


V25 = Layout("v2.5", _calls_alone, join_system=_last, blanks=8)
V3_1226 = Layout("v3-1226", _calls_alone)
R1_0120 = Layout("r1-0120", _calls_after_content, between_outputs="", thinks=True)
R1_DISTILL = Layout("r1-distill", _calls_alone, join_system=_last, thinks=True)


def parts(layout: Layout, messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns a prompt. An earlier answer is shortened to what follows its thought, unless it is between calls."""
    if not layout.thinks:
        refuse(layout.name, thinking=thinking)
    keep = after_thought if layout.thinks else str
    conversation = read(messages, layout.join_system)
    n_system = sum(message["role"] == "system" for message in messages)
    pieces: Pieces = [" " * (layout.blanks * n_system), marks.BOS, system_and_tools(conversation.system, tools)]
    was_called, had_outputs, last = False, False, None
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += [marks.USER, content]
            case Assistant(content, _, calls) if calls:
                pieces += layout.write_calls(content, calls, was_called)
                was_called = True
            case Assistant(content) if isinstance(last, Outputs):
                pieces += [marks.END_OUTPUTS, content, marks.EOS]
            case Assistant(content):
                pieces += [marks.ASSISTANT, keep(content), marks.EOS]
            case Outputs(contents):
                blocks = [p for o in contents for p in (layout.between_outputs, marks.OUTPUT, o, marks.END_OUTPUT)]
                pieces += blocks if had_outputs else [marks.OUTPUTS, *blocks[1:]]
                had_outputs = True
        last = turn
    pieces += {User: [marks.ASSISTANT], Outputs: [marks.END_OUTPUTS]}.get(type(last), [])
    return join(pieces + opening(messages, thinking))

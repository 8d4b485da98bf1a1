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

from deepseek_jax.data.chat.parts import (
    ASSISTANT,
    BOS,
    CALLS,
    END_CALLS,
    END_OUTPUT,
    END_OUTPUTS,
    END_THINK,
    EOS,
    OUTPUT,
    OUTPUTS,
    THINK,
    USER,
    Part,
    Pieces,
    join,
)
from deepseek_jax.data.chat.refusals import check_user_spoke, refuse
from deepseek_jax.data.chat.v3 import system_and_tools, write_call
from deepseek_jax.data.messages import Assistant, Call, Outputs, User, read
from deepseek_jax.errors import UserError


class Layout(NamedTuple):
    """The differences between these templates."""

    # `write_calls(content, calls, whether there were calls before)` returns pieces
    write_calls: Callable[[str, Sequence[Call], bool], Pieces]
    between_outputs: str = "\n"  # text before each output except the first
    join_system: Callable[[list[str]], str] = "\n\n".join  # joins several system prompts
    blanks: int = 0  # blanks before BOS per system prompt


def _calls_alone(content: str, calls: Sequence[Call], is_later: bool) -> Pieces:
    """Returns V2.5's calls, without content. Every call ends the block, except the very first."""
    if content:
        raise UserError(
            "a message has content and tool_calls: this chat template writes only one of them. Set content to None, or "
            "use the template 'v3' or 'r1', which write both."
        )
    first, *others = [write_call(call) for call in calls]
    pieces: Pieces = ["\n", *first, END_CALLS, EOS] if is_later else [ASSISTANT, CALLS, *first]
    return pieces + [piece for call in others for piece in ("\n", *call, END_CALLS, EOS)]


def _calls_after_content(content: str, calls: Sequence[Call], is_later: bool) -> Pieces:
    """Returns R1's calls: with content in the first round, alone in later ones."""
    if content and is_later:
        raise UserError(
            "a message has content and tool_calls after an earlier round of calls: the chat template 'r1-0120' writes "
            "only the calls. Set content to None, or use the template 'r1', which writes both."
        )
    blocks = [piece for call in calls for piece in ("\n", *write_call(call))]
    return [*(blocks if is_later else [ASSISTANT, content, CALLS, *blocks[1:]]), END_CALLS, EOS]


def _last(prompts: list[str]) -> str:
    return prompts[-1] if prompts else ""


V25 = Layout(_calls_alone, join_system=_last, blanks=8)
V3_1226 = Layout(_calls_alone)
R1_0120 = Layout(_calls_after_content, between_outputs="")
R1_DISTILL = Layout(_calls_alone, join_system=_last)


def v25_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns V2.5's prompt: eight blanks before BOS per system prompt, as in its file; only the last one is used."""
    refuse("v2.5", thinking=thinking)
    return join(_pieces(messages, tools, V25, keep=str))


def v3_1226_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns the prompt of V3 as first published."""
    refuse("v3-1226", thinking=thinking)
    return join(_pieces(messages, tools, V3_1226, keep=str))


def r1_0120_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns the prompt of R1 as first published; its later revision opens the thought (`thinking`)."""
    return join(_opened(messages, _pieces(messages, tools, R1_0120, keep=_after_thought), thinking))


def r1_distill_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns the prompt of R1's students; of several system prompts the last one is used."""
    return join(_opened(messages, _pieces(messages, tools, R1_DISTILL, keep=_after_thought), thinking))


def _pieces(messages: Sequence[dict], tools: Sequence[dict], layout: Layout, keep: Callable[[str], str]) -> Pieces:
    """Returns a prompt; `keep` shortens an earlier answer, unless it follows outputs or has calls."""
    conversation = read(messages, layout.join_system)
    n_system = sum(message["role"] == "system" for message in messages)
    pieces: Pieces = [" " * (layout.blanks * n_system), BOS, system_and_tools(conversation.system, tools)]
    was_called, had_outputs, last = False, False, None
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += [USER, content]
            case Assistant(content, _, calls) if calls:
                pieces += layout.write_calls(content, calls, was_called)
                was_called = True
            case Assistant(content) if isinstance(last, Outputs):
                pieces += [END_OUTPUTS, content, EOS]
            case Assistant(content):
                pieces += [ASSISTANT, keep(content), EOS]
            case Outputs(contents):
                blocks = [piece for o in contents for piece in (layout.between_outputs, OUTPUT, o, END_OUTPUT)]
                pieces += blocks if had_outputs else [OUTPUTS, *blocks[1:]]
                had_outputs = True
        last = turn
    return pieces + {User: [ASSISTANT], Outputs: [END_OUTPUTS]}.get(type(last), [])


def _after_thought(content: str) -> str:
    return content.rpartition(END_THINK.text)[2]


def _opened(messages: Sequence[dict], pieces: Pieces, thinking: bool) -> Pieces:
    if thinking:
        check_user_spoke(messages)
    return [*pieces, THINK, "\n"] if thinking else pieces

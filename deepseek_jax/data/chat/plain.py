r"""Chats in which plain words mark the speaker: LLM, Math, MoE, V2 and Coder-V2; Coder.

    v1, v2   BOS system \n\n ( User: u \n\n Assistant: a EOS )*
    coder    BOS system ( ### Instruction:\n u \n### Response:\n a \n EOT \n )*

A user can type these words. There are no tools and no thoughts.
"""

import functools
from collections.abc import Callable, Sequence

from deepseek_jax.data.chat import marks
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.parts import Pieces, before, join
from deepseek_jax.data.chat.refusals import refuse
from deepseek_jax.data.messages import Assistant, Conversation, User, as_message, read, read_answer


def v2_parts(
    messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False, name: str = "v2"
) -> list[Part]:
    """Returns a prompt, which ends in `Assistant:` without a blank.

    According to their cards, LLM and Math do not use a system prompt; their template writes one nevertheless, and so
    does this function.
    """
    conversation = _plain(name, messages, tools, thinking)
    pieces: Pieces = [marks.BOS, conversation.system, "\n\n" if _has_system(messages) else ""]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += ["User: ", content, "\n\nAssistant:"]
            case Assistant(content):
                pieces += [" ", content, marks.EOS]
    return join(pieces)


v1_parts = functools.partial(v2_parts, name="v1")


def v2_reply(message: dict, thinking: bool = False) -> list[Part]:
    """Returns a blank, the answer, EOS."""
    return join([" ", read_answer(message).content, marks.EOS])


def v2_parse(text: str, thinking: bool = False) -> dict:
    """Returns the text before EOS, without the blank at its start."""
    return as_message(before(marks.EOS, text).removeprefix(" "))


CODER_SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n"
)


def coder_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns a prompt; without a system prompt it starts with the published sentence and a line break.

    The model's README writes the sentence with "DeepSeek" and a full stop; the template has it as here.
    """
    conversation = _plain("coder", messages, tools, thinking, join_system="".join)
    pieces: Pieces = [marks.BOS, conversation.system if _has_system(messages) else CODER_SYSTEM]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += ["### Instruction:\n", content, "\n### Response:\n"]
            case Assistant(content):
                pieces += [content, "\n", marks.EOT, "\n"]
    return join(pieces)


def coder_reply(message: dict, thinking: bool = False) -> list[Part]:
    """Returns the answer, a line break, EOT."""
    return join([read_answer(message).content, "\n", marks.EOT])


def coder_parse(text: str, thinking: bool = False) -> dict:
    """Returns the text before EOT, without the line break at its end."""
    return as_message(before(marks.EOT, text).removesuffix("\n"))


def _has_system(messages: Sequence[dict]) -> bool:
    """Returns whether there is a system prompt, even an empty one, which the templates treat like any other."""
    return messages[0]["role"] == "system"


def _plain(
    name: str,
    messages: Sequence[dict],
    tools: Sequence[dict],
    thinking: bool,
    join_system: Callable[[list[str]], str] = "\n\n".join,
) -> Conversation:
    """Returns messages as a conversation without tools and thoughts."""
    conversation = read(messages, join_system)
    called = any(isinstance(turn, Assistant) and turn.calls for turn in conversation.turns)
    refuse(name, tools=tools, tool_calls=called, thinking=thinking)
    return conversation

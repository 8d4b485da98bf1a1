r"""Chats in which plain words tell who speaks: LLM, Math, MoE, V2 and Coder-V2; Coder.

    v1, v2   BOS system \n\n ( User: u \n\n Assistant: a EOS )*
    coder    BOS system ( ### Instruction:\n u \n### Response:\n a \n EOT \n )*

Nothing keeps a user from typing these words.  There are neither tools nor thoughts.
"""

import functools
from collections.abc import Callable, Sequence

from deepseek_jax.data.chat.parts import BOS, EOS, EOT, Part, Pieces, before, join
from deepseek_jax.data.chat.refusals import refuse
from deepseek_jax.data.messages import Assistant, Conversation, User, as_message, read, read_answer


def v2_parts(
    messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False, name: str = "v2"
) -> list[Part]:
    """A prompt ends in ``Assistant:`` and no blank.

    The cards of LLM and Math say that these models know no system prompt; their template writes one nevertheless, and
    so does this function.
    """
    conversation = _plain(name, messages, tools, thinking)
    pieces: Pieces = [BOS, conversation.system, "\n\n" if _has_system(messages) else ""]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += ["User: ", content, "\n\nAssistant:"]
            case Assistant(content):
                pieces += [" ", content, EOS]
    return join(pieces)


v1_parts = functools.partial(v2_parts, name="v1")


def v2_reply(message: dict, thinking: bool = False) -> list[Part]:
    """A blank, the answer, EOS."""
    return join([" ", read_answer(message).content, EOS])


def v2_parse(text: str, thinking: bool = False) -> dict:
    """What precedes EOS, without the blank at its start."""
    return as_message(before(EOS, text).removeprefix(" "))


CODER_SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n"
)


def coder_parts(messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Without a system prompt, the published sentence and a line end; after one's own there is no line end.

    The model's README writes the sentence with "DeepSeek" and a full stop; this is what the template has.
    """
    conversation = _plain("coder", messages, tools, thinking, join_system="".join)
    pieces: Pieces = [BOS, conversation.system if _has_system(messages) else CODER_SYSTEM]
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
    return as_message(before(EOT, text).removesuffix("\n"))


def _has_system(messages: Sequence[dict]) -> bool:
    """Whether there is a system prompt, be it an empty one, which the templates treat as any other."""
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

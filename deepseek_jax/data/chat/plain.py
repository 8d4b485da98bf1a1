r"""Chats in which plain words mark the speaker: LLM, Math, MoE, V2 and Coder-V2; Coder.

    v1, v2   BOS system \n\n ( User: u \n\n Assistant: a EOS )*
    coder    BOS system ( ### Instruction:\n u \n### Response:\n a \n EOT \n )*

A user can type these words. There are no tools and no thoughts.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

from deepseek_jax.data.chat import marks
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.parts import Pieces, Spaces, before, join
from deepseek_jax.data.chat.refusals import refuse
from deepseek_jax.data.messages import Assistant, User, as_message, read, read_answer


class Words(NamedTuple):
    """The differences between these templates."""

    name: str
    user: tuple[str, str]  # before and after what the user says
    answer: tuple[Pieces, Pieces]  # before and after the answer
    after_system: str = ""
    default_system: str = ""
    join_system: Callable[[list[str]], str] = "\n\n".join  # joins several system prompts


# Without a system prompt; the model's README writes the sentence with "DeepSeek" and a full stop, the template as here.
CODER_SYSTEM = (
    "You are an AI programming assistant, utilizing the Deepseek Coder model, developed by Deepseek Company, and you "
    "only answer questions related to computer science. For politically sensitive questions, security and privacy "
    "issues, and other non-computer science questions, you will refuse to answer\n"
)
# According to their cards, LLM and Math do not use a system prompt; their template writes one nevertheless.
V2_SPACES = Spaces(before_answer=" ")
CODER_SPACES = Spaces(after_content="\n")
V1 = Words("v1", ("User: ", "\n\nAssistant:"), ([V2_SPACES.before_answer], [marks.EOS]), after_system="\n\n")
V2 = V1._replace(name="v2")
CODER = Words(
    "coder",
    ("### Instruction:\n", "\n### Response:\n"),
    ([], [CODER_SPACES.after_content, marks.EOT, "\n"]),
    default_system=CODER_SYSTEM,
    join_system="".join,
)


def parts(words: Words, messages: Sequence[dict], tools: Sequence[dict] = (), thinking: bool = False) -> list[Part]:
    """Returns a prompt; V1's and V2's end in `Assistant:` without a blank."""
    conversation = read(messages, words.join_system)
    called = any(isinstance(turn, Assistant) and turn.calls for turn in conversation.turns)
    refuse(words.name, tools=tools, tool_calls=called, thinking=thinking)
    has_system = messages[0]["role"] == "system"  # an empty one counts too, as in the templates
    system = [conversation.system, words.after_system] if has_system else [words.default_system]
    pieces: Pieces = [marks.BOS, *system]
    for turn in conversation.turns:
        match turn:
            case User(content):
                pieces += [words.user[0], content, words.user[1]]
            case Assistant(content):
                pieces += [*words.answer[0], content, *words.answer[1]]
    return join(pieces)


def v2_reply(message: dict, thinking: bool = False) -> list[Part]:
    """Returns a blank, the answer, EOS."""
    return join([V2_SPACES.before_answer, read_answer(message).content, marks.EOS])


def v2_parse(text: str, thinking: bool = False) -> dict:
    """Returns the text before EOS, without the blank at its start."""
    return as_message(before(marks.EOS, text).removeprefix(V2_SPACES.before_answer))


def coder_reply(message: dict, thinking: bool = False) -> list[Part]:
    """Returns the answer, a line break, EOT."""
    return join([read_answer(message).content, CODER_SPACES.after_content, marks.EOT])


def coder_parse(text: str, thinking: bool = False) -> dict:
    """Returns the text before EOT, without the line break at its end."""
    return as_message(before(marks.EOT, text).removesuffix(CODER_SPACES.after_content))

"""What clients send, as the ids of a prompt. Nothing but the server's own templates turns messages into text."""

from collections.abc import Sequence
from typing import NamedTuple

from deepseek_jax.data.chat import END_THINK, Template, fim_parts, is_task, join, to_ids
from deepseek_jax.data.chat.marks import Part
from deepseek_jax.data.chat.parts import Pieces
from deepseek_jax.data.messages import read_answer
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.api.requests import ChatBody


class Prompt(NamedTuple):
    """The ids before an answer.

    `thinking`: they end in a thought. `continues`: they end in the answer itself, which continues them, or in a quick
    token, after which there is no thought.
    """

    ids: list[int]
    thinking: bool = False
    continues: bool = False

    def may_think(self, template: Template, tokenizer: Tokenizer) -> bool:
        """Whether the answer may open a thought."""
        is_closed = self.continues or self.thinking or not template.thinks
        return not is_closed and self.ids[-1:] != tokenizer.encode(END_THINK.text, specials=True).tolist()


def chat_prompt(template: Template, tokenizer: Tokenizer, body: ChatBody) -> Prompt:
    """Returns the prompt of a conversation, to be answered, or whose last message is to be completed."""
    *earlier, last = body.messages
    tools = [] if body.tool_choice == "none" else body.tools or []
    if last.get("role") != "assistant":
        thinking = body.thinks(template)
        prompt = template.prompt(body.messages, tools, thinking, body.effort)
        ids = to_ids(prompt, tokenizer).tolist()
        return Prompt(ids, continues=True) if is_task(prompt) else Prompt(ids, thinking)
    if last.get("prefix") is not True:
        raise UserError(
            "the last message is the assistant's: expected one of the user or of a tool, or prefix: true, which "
            "completes the message."
        )
    if not earlier:
        raise UserError("a message to complete has no message before it. Add one of the user.")
    parts, thinking = _begun(template, earlier, tools, last, body.effort)
    return Prompt(to_ids(parts, tokenizer).tolist(), thinking, continues=True)


def _begun(
    template: Template, earlier: list[dict], tools: list[dict], last: dict, effort: str
) -> tuple[list[Part], bool]:
    """The prompt up to the end of a begun answer, and whether that is in its thought."""
    content, thought, calls = read_answer({"content": ""} | last)
    if calls:
        raise UserError("a message to complete has tool_calls: expected text alone.")
    spaces, thinks = template.spaces, last.get("reasoning_content") is not None
    begun: Pieces = [spaces.before_answer, content]
    if thinks:
        begun = [thought, spaces.after_thought, END_THINK, spaces.before_content, content] if content else [thought]
    pieces: Pieces = [*template.prompt(earlier, tools, thinks, effort), *begun]
    return join(pieces), thinks and not content


def text_prompt(tokenizer: Tokenizer, given: str | list[int], suffix: str | None) -> list[int]:
    """Returns the ids of a text or ids to be continued, or of a gap between a text and its `suffix`."""
    if isinstance(given, str) and suffix is not None:
        parts = fim_parts(given, suffix)
        return to_ids(parts if tokenizer.add_bos else parts[1:], tokenizer).tolist()
    if suffix is not None:
        raise UserError("suffix with a prompt of ids: expected a prompt of text.")
    if not isinstance(given, str):
        return checked_ids(tokenizer, given)
    return [*begin(tokenizer), *tokenizer.encode(given).tolist()]


def begin(tokenizer: Tokenizer) -> list[int]:
    """Returns what every text begins with, as the tokenizer's settings ask."""
    return [tokenizer.bos_id] if tokenizer.add_bos and tokenizer.bos_id is not None else []


def checked_ids(tokenizer: Tokenizer, ids: Sequence[int]) -> list[int]:
    """Returns the ids. Raises UserError for one that the vocabulary does not have."""
    if any(not 0 <= token < tokenizer.vocab_size for token in ids):
        raise UserError(f"ids of a prompt: expected 0 to {tokenizer.vocab_size - 1}.")
    return list(ids)

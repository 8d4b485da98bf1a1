"""A conversation with a model in its own chat format: the messages so far, and the next answer as it is generated.

    dialogue = Dialogue(chat.template("r1"), model.tokenizer, model.stream, model.n_positions)
    for piece in dialogue.say("1+1=?", max_new_tokens=512):
        print(piece.text, end="")               # piece.is_thought: the thought comes first
    dialogue.messages                           # with the answer as a message

The template decides what the model sees of earlier answers: thoughts are dropped if it drops them.
"""

from collections.abc import Callable, Generator, Iterator, Sequence

from deepseek_jax.data.chat import Template, to_ids
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.reply import Piece, Reply


class Dialogue:
    """A conversation with a model.

    Args:
        template: chat template of the model.
        tokenizer: tokenizer of the model, with the special tokens of the template.
        stream: `stream(ids of a prompt, max_new_tokens=…, stop_ids=…)` returns an iterator of new ids, like
            `LanguageModel.stream`.
        n_positions: largest number of tokens, prompt and answer together.
        stop_ids: ids that end an answer in addition to the template's own.
        system: system prompt, "" for none.
        thinking: whether the prompt opens a thought; by default as in the published template.

    Attributes:
        messages: the messages so far, in the format of `chat`.
        ending: how the last answer ended: "mark", "max_new_tokens", "n_positions", "stopped", or "" if it has not.

    Raises UserError: the tokenizer misses special tokens of the template; `thinking` with a template without thoughts.
    """

    def __init__(
        self,
        template: Template,
        tokenizer: Tokenizer,
        stream: Callable[..., Iterator[int]],
        n_positions: int,
        stop_ids: Sequence[int] = (),
        system: str = "",
        thinking: bool | None = None,
    ):
        self.template, self.tokenizer, self.n_positions = template, tokenizer, n_positions
        self._stream, self._system = stream, system
        self._thinking = template.opens_thought if thinking is None else thinking
        self._stop_ids = tuple({*stop_ids, *to_ids([template.end], tokenizer).tolist()})
        self.ending, self._is_stopped = "", False
        self.reset()
        self._prompt("?")  # errors of tokenizer or template are raised before the first message

    def reset(self) -> None:
        """Forgets all messages except the system prompt."""
        self.messages = [{"role": "system", "content": self._system}] if self._system else []

    def say(self, text: str, max_new_tokens: int) -> Generator[Piece]:
        """Yields the answer to a message, piece by piece.

        Both are added to `messages` when the answer ends or the iterator is closed, unless no token was generated.

        Raises UserError: the conversation with this message does not fit into the model's positions.
        """
        prompt = self._prompt(text)
        free = self.n_positions - len(prompt)
        if free < 1:
            raise UserError(
                f"the conversation has {len(prompt)} tokens with this message: expected fewer than {self.n_positions}. "
                "Start a new one (/reset), or shorten the message."
            )
        self.ending, self._is_stopped = "", False
        return self._answer(text, prompt, min(max_new_tokens, free))

    def stop(self) -> None:
        """Ends the answer before its next token; safe in a signal handler, since no computation is interrupted."""
        self._is_stopped = True

    def _prompt(self, text: str) -> list[int]:
        messages = [*self.messages, {"role": "user", "content": text}]
        return to_ids(self.template.parts(messages, thinking=self._thinking), self.tokenizer).tolist()

    def _answer(self, text: str, prompt: list[int], max_new_tokens: int) -> Generator[Piece]:
        ids: list[int] = []
        reply = Reply(self.template, self.tokenizer, self._thinking)
        try:
            for token in self._stream(prompt, max_new_tokens=max_new_tokens, stop_ids=self._stop_ids):
                if self._is_stopped:
                    break
                ids.append(token)
                if token not in self._stop_ids:
                    yield from reply.push([token])
            yield from reply.finish()
            self.ending = self._ending(ids, len(prompt))
        finally:
            reply.finish()
            if ids:
                self.messages += [{"role": "user", "content": text}, reply.message()]

    def _ending(self, ids: list[int], n_prompt: int) -> str:
        if self._is_stopped:
            return "stopped"
        if ids[-1] in self._stop_ids:
            return "mark"
        return "n_positions" if n_prompt + len(ids) >= self.n_positions else "max_new_tokens"

"""Problems as ids that a model reads, and the ids that it draws as responses: by its chat template, once each way."""

from collections.abc import Sequence

import numpy as np

from deepseek_jax.data.chat import template, to_ids
from deepseek_jax.data.chat.marks import THINK
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.rl.problems import Problem
from deepseek_jax.rl.rewards import Response


class Turns:
    """The chat format of a run.

    Args:
        tokenizer: of the model.
        name: of the chat template.
        thinking: whether the prompt opens a thought.
        longest_prompt, longest_answer: in tokens.
        end_ids: that end an answer besides the template's own mark, as they do in generation (`release.marks`).
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        name: str,
        thinking: bool,
        longest_prompt: int,
        longest_answer: int,
        end_ids: Sequence[int] = (),
    ):
        self.tokenizer, self.name, self.thinking = tokenizer, name, thinking
        self.template = template(name)
        self.longest_prompt, self.longest_answer = longest_prompt, longest_answer
        self.end_id = int(to_ids([self.template.end], tokenizer)[0])
        self.end_ids = tuple(sorted({self.end_id, *end_ids}))

    def prompt(self, problem: Problem, where: str) -> np.ndarray:
        """Returns the ids of a problem, int32. Raises UserError, naming it by `where`, if they are too many."""
        ids = to_ids(self.template.parts(problem.messages, (), self.thinking), self.tokenizer)
        if len(ids) > self.longest_prompt:
            raise UserError(
                f"{where} has {len(ids)} tokens: expected rl.longest_prompt={self.longest_prompt} at most. "
                "Raise it; a prompt is never cut."
            )
        return ids

    def response(self, drawn: Sequence[int], is_finished: bool) -> Response:
        """Returns the ids that were drawn, end mark included, as a response."""
        has_other_end = is_finished and drawn[-1] != self.end_id
        text = self.tokenizer.decode(drawn[:-1] if has_other_end else drawn, specials=True)
        message = self.template.parse(text, self.thinking)
        is_opened = self.thinking or text.lstrip().startswith(THINK.text)
        return Response(message, len(drawn), self.longest_answer, is_finished, is_opened)

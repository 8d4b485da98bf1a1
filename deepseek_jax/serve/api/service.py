"""What the routes serve: one model behind one engine."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field

from deepseek_jax.bounds import shown
from deepseek_jax.data.chat import Template
from deepseek_jax.data.tokenizer import Tokenizer
from deepseek_jax.errors import UserError
from deepseek_jax.serve.api.compiling import Compiling
from deepseek_jax.serve.api.metrics import Metrics
from deepseek_jax.serve.grammar import Grammars
from deepseek_jax.serve.loads import ExpertLoads
from deepseek_jax.serve.worker import Worker

MOST_SPELT = 2**16  # tokens whose texts are kept


@dataclass(frozen=True)
class Service:
    """What the routes need.

    `template` is None for a base model, which continues texts; `drawing` are temperature and top_p of requests that do
    not say; `keys` are those of which a client must have one, if there are any.
    """

    worker: Worker
    name: str
    tokenizer: Tokenizer
    template: Template | None
    end_ids: tuple[int, ...]
    n_positions: int
    drawing: dict[str, float] = field(default_factory=lambda: {"temperature": 1.0, "top_p": 1.0})
    keys: tuple[str, ...] = ()

    @functools.cached_property
    def loads(self) -> ExpertLoads:
        """How evenly the experts are loaded."""
        return ExpertLoads(self.worker.engine)

    @functools.cached_property
    def metrics(self) -> Metrics:
        """Counts and times of this server."""
        return Metrics(self.worker, self.loads)

    @functools.cached_property
    def spelling(self) -> Callable[[int], str]:
        """Returns the text of a token; most are asked for often."""
        return functools.lru_cache(MOST_SPELT)(lambda token: self.tokenizer.decode([token], specials=True))

    @functools.cached_property
    def grammars(self) -> Grammars:
        """Compiles the forms that answers may be asked to have; the first use reads the vocabulary."""
        return Grammars(self.tokenizer, self.end_ids)

    @functools.cached_property
    def compiling(self) -> Compiling:
        """`grammars.compile`, aside."""
        return Compiling(lambda grammar: self.grammars.compile(grammar))

    def check_model(self, name: str) -> None:
        """Raises UserError for another model's name; "" stands for this one."""
        if name and name != self.name:
            raise UserError(f"model {shown(name)}: this server has {self.name!r}.")

    def check_choices(self, n_choices: int) -> None:
        """Raises UserError for a request with more answers than the worker takes."""
        if n_choices > self.worker.most:
            raise UserError(f"a request for {n_choices} answers: expected {self.worker.most} or fewer.")

    def n_free(self, prompt: list[int]) -> int:
        """Returns how many tokens may follow a prompt. Raises UserError if there is none, or no prompt."""
        n_free = self.n_positions - len(prompt)
        if not prompt:
            raise UserError("the prompt is empty: expected one token or more.")
        if n_free < 1:
            raise UserError(
                f"a prompt of {len(prompt)} tokens: expected fewer than {self.n_positions}, the longest sequence that "
                "the model and the cache have place for."
            )
        return n_free

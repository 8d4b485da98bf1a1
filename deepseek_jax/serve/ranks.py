"""The requests of one device: who runs, on which pages, how each draws, and where its last token is."""

from dataclasses import dataclass, field

from deepseek_jax.serve.outputs import Logprob
from deepseek_jax.serve.pages import PagePool
from deepseek_jax.serve.sampling import Sampling
from deepseek_jax.serve.scheduler import Request, Scheduler


@dataclass(eq=False)
class Row:
    """The caller's part of a request: how it draws, its device, and its place in `last_R` there, -1 for none."""

    sampling: Sampling
    rank: int
    slot: int = -1
    is_constrained: bool = False  # whether its place in `allowed_RW` counts for its next token
    prompt_logprobs: list[Logprob | None] = field(default_factory=list)


class Rank:
    """The requests of one device: who runs, on which pages, and where it keeps what they drew last."""

    def __init__(self, pages: PagePool, n_rows: int, chunk: int):
        self.pages = pages
        per_step = 1 + pages.look_ahead  # names of pages cover as many tokens more as there are drafts
        self.scheduler = Scheduler(pages, n_rows, budget=n_rows + chunk, chunk=chunk, per_step=per_step)
        self._slots = list(range(n_rows))
        self._with_slot: list[Row] = []

    @property
    def n_open(self) -> int:
        """Requests that run or wait."""
        return len(self.scheduler.running) + len(self.scheduler.waiting)

    def assign_slots(self, requests: list[Request]) -> None:
        """Gives each of these a place in `last_R`, of which those that no longer run have none."""
        running = {request.options for request in self.scheduler.running}
        for row in [row for row in self._with_slot if row not in running]:
            self._slots.append(row.slot)
            row.slot = -1
            self._with_slot.remove(row)
        for row in (request.options for request in requests):
            if row.slot < 0:
                row.slot = self._slots.pop()
                self._with_slot.append(row)

"""The training loop: read, step, and now and then log, evaluate, save.

The step number is the only state of the data: a run that is killed at any moment resumes from its last checkpoint with
the same samples and ends with the same weights, bit for bit. One step is always in flight: the loop looks at a step's
report only when the next one has been handed to the devices.
"""

import functools
import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deepseek_jax.data.pipeline import Batch, Split
from deepseek_jax.errors import UserError
from deepseek_jax.layers.router import max_violation
from deepseek_jax.parallel.mesh import batch_share, global_batch, largest
from deepseek_jax.train.anticipated import ahead, chosen
from deepseek_jax.train.attempts import Attempts
from deepseek_jax.train.average import MovingAverage
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.hosts import Hosts
from deepseek_jax.train.ledger import Ledger
from deepseek_jax.train.metrics import Metrics, bits_per_byte
from deepseek_jax.train.phases import COMPILE, EVALUATE, INPUT, PROFILE, SAVE, STEP, WAIT, Phases
from deepseek_jax.train.profiles import Profiles
from deepseek_jax.train.ramp import BatchRamp, Shares, share
from deepseek_jax.train.redundant import RedundantEvaluator, imbalance
from deepseek_jax.train.step import Evaluation, Report, State, Trainer
from deepseek_jax.train.stop import StopRequest
from deepseek_jax.tree import Path, paths

NOT_LOGGED = ("auxiliary", "loads", "finite", "sent")  # fields of a report that are no figure of their own
EMA = "ema"  # entry of a checkpoint: the moving average of its params
Places = dict[
    str, tuple[Path, tuple[int, ...]]
]  # name -> where a router's row is: path in a tree like `loads`, and index
POLL_EVERY_S = 5.0  # between the moments at which processes ask one another whether to stop


@dataclass(frozen=True)
class LoopConfig:
    """When the loop does what besides stepping; all in steps."""

    steps: int  # length of the run
    log_every: int  # between log lines
    # eval_every, eval_batches: between evaluations, and batches of each (of the final batch size)
    eval_every: int
    eval_batches: int
    # replicas of experts in evaluations, beside one of each, placed by the loads of the last step; 0: none
    eval_redundant: int
    checkpoint_every: int  # between checkpoints; the last step is always saved
    max_skipped: int  # non-finite steps in a row that stop the run
    routing_delay: int  # steps by which experts are chosen before they are visited (`train.anticipated`); 0: none


class StopPoll:
    """Polls all processes for a request to stop; an answer makes them wait for the step in flight.

    They poll after a number of steps that takes about `POLL_EVERY_S` on the slowest of them, the same on all, from
    `start` on; the last step is `steps`.
    """

    def __init__(self, stop: StopRequest, start: int, steps: int):
        self._stop, self._next, self._steps = stop, start, steps
        self._last, self._last_s, self._step_s = start, time.monotonic(), math.inf

    def should_stop(self, step: int) -> bool:
        """Whether the run ends after `step`: the same answer on all processes."""
        if jax.process_count() == 1:
            return self._stop.signal is not None
        if step < self._next:
            return False
        is_asked, step_s = largest(self._stop.signal is not None, self._step_s)
        self._next = step + min(max(int(POLL_EVERY_S / max(step_s, 1e-3)), 1), 1000)
        now, steps = time.monotonic(), step - self._last
        if steps:  # from answer to answer, for an answer waits until the step has ended
            self._step_s = (now - self._last_s) / steps
        self._last, self._last_s = step, now
        self._stop.ends_early = bool(is_asked) and step < self._steps
        return bool(is_asked)


class Loop:
    """A run from its checkpoint (or the beginning) to its last step.

    `meta` is kept beside each checkpoint. `average` is saved as "ema"; `judge_average`: evaluations take it. `phases`
    hears what the run is doing; `ledger`, `hosts` and `profiles` report on it.
    """

    def __init__(
        self,
        trainer: Trainer,
        ramp: BatchRamp,
        config: LoopConfig,
        *,
        training: Split,
        held_out: Split | None,
        checkpoints: Checkpointer,
        metrics: Metrics,
        meta: dict,
        average: MovingAverage | None = None,
        judge_average: bool = False,
        phases: Phases | None = None,
        ledger: Ledger | None = None,
        hosts: Hosts | None = None,
        profiles: Profiles | None = None,
    ):
        self.trainer, self.ramp, self.config = trainer, ramp, config
        self.training, self.held_out = training, held_out
        self.checkpoints, self.metrics, self.meta = checkpoints, metrics, meta
        self.average, self.judge_average = average, judge_average
        self.phases = phases or Phases()
        self.ledger, self.hosts, self.profiles = ledger, hosts, profiles
        self._logged: int | None = None
        byte_lengths_V = jnp.zeros((trainer.vocab_size,), jnp.int32)
        byte_lengths_V = byte_lengths_V.at[: training.vocab_size].set(training.tokenizer.byte_lengths())
        self._evaluate = trainer.evaluator(byte_lengths_V)
        if config.routing_delay:
            mask = trainer.objective.mask_documents  # type: ignore[attr-defined]  # `Anticipating`
            self._chosen = trainer.with_model(functools.partial(chosen, mask=mask))
        self._loads: dict | None = None  # of the last step
        self._redundant: RedundantEvaluator | None = None
        if config.eval_redundant:
            self._redundant = RedundantEvaluator(trainer, byte_lengths_V, config.eval_redundant)

    def run(self, state: State, stop: StopRequest) -> State:
        """Trains from `state` to the last step, or until `stop` is asked for; the state it ends with has been saved.

        Raises UserError if too many steps in a row were not finite.
        """
        start = int(state["step"])
        stop.begin()
        poll = StopPoll(stop, start, self.config.steps)
        if poll.should_stop(start):
            return state
        if start == 0:
            self.evaluate(state, 0)
        with self.phases.of(STEP):
            return self._steps(state, start, poll)

    def _steps(self, state: State, start: int, poll: StopPoll) -> State:
        """Trains from `state`, that after `start` steps."""
        waiting: tuple[int, Report] | None = None
        done = start
        batches: Generator = self.batches(start)
        if self.config.routing_delay:
            batches = ahead(batches, self.config.routing_delay, lambda batch: self._chosen(state, batch))
        try:
            for done, batch in enumerate(batches, start + 1):
                if self.profiles:
                    with self.phases.of(PROFILE):
                        self.profiles.before(done)
                with self.phases.of(COMPILE if done == start + 1 else STEP):
                    state, report = self.trainer.step(state, batch)
                if self.average:
                    self.average.add(state["params"], report.finite)
                if waiting:
                    self.check_finite(*waiting)
                waiting, self._loads = (done, report), report.loads
                with self.phases.of(WAIT):
                    stopping = poll.should_stop(done)
                if done == start + 1 or self.is_due(done, self.config.log_every):
                    self.log(done, report, state)
                if self.is_due(done, self.config.eval_every):
                    self.evaluate(state, done)
                if stopping or self.is_due(done, self.config.checkpoint_every):
                    self.save(done, state)
                if stopping:
                    break
            if waiting:
                self.check_finite(*waiting)
        finally:
            batches.close()
        return state

    def is_due(self, step: int, every: int) -> bool:
        """Whether something that is done `every` so many steps, and after the last one, is due after `step`."""
        return step == self.config.steps or (every > 0 and step % every == 0)

    def batches(self, start: int) -> Generator[Batch]:
        """The global batches of the steps from `start` on, read ahead."""
        steps = range(start, self.config.steps)
        read = iter(self.training.batches(Shares(self.ramp, steps, *batch_share(self.trainer.mesh))))
        while True:
            with self.phases.of(INPUT):
                rows = next(read, None)
            if rows is None:
                return
            yield global_batch(rows, self.trainer.mesh)

    def check_finite(self, step: int, report: Report) -> None:
        """Reports a step that was skipped; raises UserError after too many in a row."""
        with self.phases.of(WAIT):
            in_row = int(report.skipped_in_row)
        self.phases.progress()
        if not in_row:
            return
        what = f"loss {float(report.loss):.4g}, gradient norm {float(report.gradient_norm):.4g}"
        self.metrics.message(f"step {step} skipped: not finite ({what}); weights and moments are untouched.")
        if in_row >= self.config.max_skipped:
            raise UserError(
                f"{in_row} steps in a row were not finite (the last, step {step}: {what}). The weights of step "
                f"{step - in_row} are intact. Lower config.schedule.peak_rate or look at the text of these steps."
            )

    def log(self, step: int, report: Report, state: State) -> None:
        """Writes a step's figures."""
        with self.phases.of(WAIT):
            report = jax.device_get(report)
        scalars = {name: getattr(report, name).item() for name in Report._fields if name not in NOT_LOGGED}
        scalars |= {name: loss.item() for name, loss in report.auxiliary.items()}
        scalars["bits_per_byte"] = bits_per_byte(scalars["main"], self.training.bytes_per_token)
        routers = {"expert_load": report.loads, "router_bias": self.trainer.router_biases(state)}
        places = router_places(report.loads, self.trainer.layers) if report.loads else {}
        layers = {name: rows_of(report.loads, tree, places) for name, tree in routers.items() if places and tree}
        if not places:
            del scalars["max_violation"]
        last = step - 1 if self._logged is None else self._logged
        tokens = (self.ramp.first(step) - self.ramp.first(last)) * self.training.seq_len
        self._logged = step
        exchange = exchange_figures(self.trainer, report)
        self.metrics.step(step, scalars, layers, tokens=tokens, rows=list(places), exchange=exchange)
        self.checkpoints.report()
        if self.hosts:
            with self.phases.of(WAIT):
                self.hosts.compare(step)
        if self.ledger:
            self.ledger.note(step, due=False)

    def evaluate(self, state: State, step: int) -> float | None:
        """Bits per byte of the main model on held-out text; what is recorded besides is its loss per target."""
        if self.held_out is None:
            return None
        with self.metrics.paused(), self.phases.of(EVALUATE):
            if self.average and self.judge_average:
                state = state | {"params": self.average.params()}
            evaluate, balance = self._evaluation(state)
            sums, size = np.zeros(3), self.ramp.size
            for first in range(0, min(size * self.config.eval_batches, self.held_out.n_samples), size):
                start, count = share(first, size, *batch_share(self.trainer.mesh))
                rows = self.held_out.rows(start, count)
                is_new_B = np.arange(start, start + count) < self.held_out.n_samples  # past the end it begins anew
                rows = rows._replace(weights_BT=rows.weights_BT * is_new_B[:, None])
                sums += [float(part) for part in evaluate(global_batch(rows, self.trainer.mesh))]
            nats, n_bytes, weight = sums.tolist()
            figures = {"main": nats / weight}
            if n_bytes:  # answers that are nothing but their end marks have none
                figures["bits_per_byte"] = nats / (n_bytes * math.log(2))
            self.metrics.evaluation(step, figures | balance)
        return figures.get("bits_per_byte")

    def _evaluation(self, state: State) -> tuple[Callable[[Batch], Evaluation], dict]:
        """What judges a batch with the weights of `state`, and how even the work of the experts' devices is."""
        if self._redundant is None or self._loads is None:
            return functools.partial(self._evaluate, state), {}
        where = self._redundant.placed(self._loads)
        before, after = imbalance(jax.device_get(self._loads), where, self._redundant.n_devices)
        weights = self._redundant.weights(state, where)
        return functools.partial(self._redundant, weights), {"imbalance": before, "imbalance_redundant": after}

    def save(self, step: int, state: State) -> None:
        """Hands the state to the checkpointer, which writes while training continues."""
        with self.metrics.paused(), self.phases.of(SAVE):
            stored = self.trainer.store(state)
            if self.average:  # beside the state, which may be `stored` itself and goes into the next step
                stored = stored | {EMA: self.trainer.store({"params": self.average.params()})["params"]}
            self.checkpoints.save(step, stored, self.meta)
        if self.ledger:
            self.ledger.note(step)


def rows_of(loads: dict, tree: dict, places: Places) -> np.ndarray:
    """The floating arrays of all routers, one each, as one [layers, experts]: of `loads`, or of what it is a prefix of.

    A router that has none, as its experts are named by a table of integers, has a row of zeros.
    """

    def row(load: np.ndarray, below: Any) -> np.ndarray:
        found = [leaf for leaf in jax.tree.leaves(below) if jnp.issubdtype(leaf.dtype, jnp.floating)]
        return found[0] if found else np.zeros_like(load)

    rows = paths(jax.tree.map(row, loads, tree))
    return np.stack([rows[path][index] for path, index in places.values()])


def exchange_figures(trainer: Trainer, report: Report) -> dict[str, float]:
    """How the exchange of tokens went, in the terms of `figures.LEGEND`; nothing where no expert is elsewhere."""
    exchange = trainer.run.exchange
    if exchange is None:
        return {}
    loads = np.concatenate([np.atleast_2d(load) for load in jax.tree.leaves(report.loads)])
    imbalance = max_violation(loads.reshape(len(loads), exchange.n_devices, -1).sum(axis=-1))
    within, across = (float(part) / trainer.mesh.size / 2**30 for part in report.sent[:2])
    found = {"imbalance": float(np.mean(imbalance)), "sent_gib": within + across}
    found |= {"crossing_gib": across} if exchange.groups > 1 else {}
    return found | ({"repeated": trainer.step.repeated} if isinstance(trainer.step, Attempts) else {})


def router_places(loads: dict, layers: Sequence[tuple[Path, int]]) -> Places:
    """What the rows of all routers are called, in this order: layers by their number in the model, then depths of MTP.

    `layers` are those of the main model in the order of running, with routers or without (`Trainer.layers`).
    """
    found = paths(loads)
    places: Places = {f"layer_{n:02d}": (path, (row,)) for n, (path, row) in enumerate(layers) if path in found}
    return places | {f"mtp_{path[1]}": (path, ()) for path in found if path[0] == "mtp"}

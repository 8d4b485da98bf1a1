"""Measure steps of reinforcement learning, rollout and updates, side by side with TRL on transformers.

    deepseek-jax bench rl                                          # tiny_zero on this machine's CPU beside TRL
    deepseek-jax bench rl --peer-python=/path/to/python            # an interpreter that has torch and trl
    deepseek-jax bench rl --config=r1_distill_qwen_1b5 --no-peer --questions=16 --answers=16 --new-tokens=1024

Both sides have fresh weights of the same sizes in the same precision, answer random prompts of one length with answers
of one length, and learn from them by GRPO: as many answers to each prompt, updates per step, the same clip and AdamW.
An answer is worth 1 if its first id is odd. They take turns, after one that warms up and is not counted. Printed are
the medians over the turns, in tokens of answers per second of a step and per second of CPU time of all threads, and
their ratio. A V3 is measured without multi-token prediction, which neither side would use. On our side the shares of
rollout, reward and update are printed too, and on standard error those of each step as it ends. The peer comes with:
pip install "deepseek_jax[parity]"
"""

import contextlib
import statistics
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.bounds import path, whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._peer import PeerProcess, in_turns, transformers_sizes
from deepseek_jax.units import binary

if TYPE_CHECKING:
    from deepseek_jax.rl.problems import Problem
    from deepseek_jax.rl.rewards import Response, Score

SIZE = whole(1, 10**6)
EXTRA = {
    "questions": (int, None, "prompts of a step (default of this and the next four: what config.rl has)", SIZE),
    "answers": (int, None, "answers to each", SIZE),
    "updates": (int, None, "updates per step, each on its share of the answers", SIZE),
    "prompt_tokens": (int, None, "tokens of a prompt", SIZE),
    "new_tokens": (int, None, "tokens of an answer", SIZE),
    "turns": (int, 5, "times that each side is measured", whole(1, 10**6)),
    "steps": (int, 1, "steps of one turn", whole(1, 10**6)),
    "peer": (bool, True, "measure TRL as well"),
    "peer_python": (str, sys.executable, "the interpreter that has torch, transformers and trl", path(1)),
    "peer_experts": (str, "grouped_mm", "how transformers computes experts: grouped_mm, batched_mm or eager"),
}
SIZES = {"questions": "questions", "answers": "answers", "updates": "updates"}  # flag -> key of config.rl
SIZES |= {"prompt_tokens": "longest_prompt", "new_tokens": "longest_answer"}


class Taken(NamedTuple):
    """Seconds of a turn."""

    wall: float
    cpu: float


def main(argv: list[str]) -> int:
    """Runs the bench; returns the exit code."""
    options = _options.parse(argv, "tiny_zero", EXTRA, workdir=False)
    config = settled(run_config.validate(options.config), options)
    with contextlib.ExitStack() as stack:
        sides: dict[str, Ours | Peer] = {"deepseek_jax": Ours(config)}
        if options.peer:
            sides["trl"] = stack.enter_context(Peer(config, options.peer_python, options.peer_experts))
        report(config, sides, in_turns(sides, options.turns, options.steps), options.steps)
    return 0


def settled(config: ConfigDict, options: Any) -> ConfigDict:
    """Returns the config of what both sides do."""
    from deepseek_jax.launch._reinforcement import check_sizes

    rl = config.rl
    for flag, key in SIZES.items():
        if (size := getattr(options, flag)) is not None:
            rl[key] = whole(1, 10**6).check(f"--{flag.replace('_', '-')}", size)
    rl.temperature = rl.top_p = 1.0
    rl.grpo.beta = config.loss.balance_rate = 0.0
    if "mtp_depth" in config.model:
        config.model.mtp_depth = 0
    check_sizes(config)
    if options.peer and config.precision != "fp32":
        raise UserError(f"{config.name}: the peer computes in fp32. Set --config.precision=fp32 or --no-peer.")
    return config


class Ours:
    """Our steps; compiled in the first."""

    def __init__(self, config: ConfigDict):
        from deepseek_jax.compat import keep_freed_memory, start_compilation_cache

        keep_freed_memory()
        start_compilation_cache("")
        import jax

        from deepseek_jax import run
        from deepseek_jax.launch._reinforcement import check_rows, engine_roller
        from deepseek_jax.parallel.mesh import make_mesh
        from deepseek_jax.rl.grpo import GRPO
        from deepseek_jax.rl.objective import PolicyGradient, learnt
        from deepseek_jax.rl.step import Learner, StepSizes

        if config.precision == "fp32":  # GPUs and TPUs would otherwise round the operands of a matmul
            jax.config.update("jax_default_matmul_precision", "highest")
        rl = config.rl
        objective = PolicyGradient(GRPO(**rl.grpo), rl.temperature, config.loss.chunk, run.auxiliary(config))
        trainer = run.trainer(config, make_mesh(**config.mesh), objective, learnt, routes=rl.keep_routing)
        check_rows(config, trainer.mesh.size)
        sizes = StepSizes(rl.questions, rl.answers, rl.updates, rl.temperature, rl.top_p, rl.rows_at_once)
        task: Any = Task(config)
        roll = engine_roller(config, trainer, task)
        self.learner = Learner(trainer, task, task, task, sizes, config.seed, roll=roll)
        self.state, self.done = trainer.init(config.seed), 0
        self.seconds: list[dict[str, float]] = []  # of each step, by what they were spent on
        self.n_params = trainer.n_params
        self.title = f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {config.precision}"

    def run(self, n_steps: int) -> Taken:
        """Runs some steps."""
        begin = time.perf_counter(), time.process_time()
        for _ in range(n_steps):
            self.state, self.figures = self.learner.step(self.state, None, self.done)
            self.seconds.append(self.learner.seconds)
            self.done += 1
            print(f"step {self.done}: {parts_of(self.learner.seconds)}", file=sys.stderr, flush=True)
        return Taken(time.perf_counter() - begin[0], time.process_time() - begin[1])


class Task:
    """Random prompts and what answers to them are worth: in place of `Turns`, `Problems` and `Rewards`."""

    def __init__(self, config: ConfigDict):
        self.longest_prompt, self.longest_answer = config.rl.longest_prompt, config.rl.longest_answer
        self.vocab_size, self.seed = config.model.vocab_size, config.seed
        self.end_ids = (-1,)  # no token: every answer has its full length

    def training(self, number: int) -> "Problem":
        """Returns a problem, which is its number."""
        from deepseek_jax.rl.problems import Problem

        return Problem(({"role": "user", "content": str(number)},), number, "exact")

    def prompt(self, problem: "Problem", where: str) -> np.ndarray:
        """Returns random ids."""
        draw = np.random.default_rng((self.seed, problem.answer))
        return draw.integers(2, self.vocab_size, self.longest_prompt, dtype=np.int32)

    def response(self, drawn: Sequence[int], is_finished: bool) -> "Response":
        """Returns ids as a response of numbers."""
        from deepseek_jax.rl.rewards import Response

        return Response({"content": " ".join(map(str, drawn))}, len(drawn), self.longest_answer, is_finished)

    def score(self, problems: "Sequence[Problem]", responses: "Sequence[Response]") -> "list[Score]":
        """Returns 1 for answers that begin with an odd id."""
        from deepseek_jax.rl.rewards import Score

        worth = [float(int(response.content.partition(" ")[0]) % 2) for response in responses]
        return [Score(value, {"accuracy": value}) for value in worth]


class Peer(PeerProcess):
    """TRL's GRPOTrainer."""

    def __init__(self, config: ConfigDict, python: str, experts: str):
        rl, o = config.rl, config.optimizer
        job = {
            "sizes": transformers_sizes(config) | {"use_cache": True},
            "experts": experts,
            "optimizer": {
                "rate": config.schedule.peak_rate,
                "betas": (o.beta1, o.beta2),
                **{key: o[key] for key in ("eps", "weight_decay")},
                "clip_norm": config.loss.clip_norm,
            },
            "rl": {
                "rows": rl.questions * rl.answers,
                **{key: rl[key] for key in ("answers", "updates")},
                "prompt_tokens": rl.longest_prompt,
                "new_tokens": rl.longest_answer,
                **{key: rl.grpo[key] for key in ("clip_low", "clip_high")},
            },
        }
        super().__init__("_torch_rl.py", job, python)
        self.title, self.n_params = self.ready["name"], self.ready["n_params"]

    def run(self, n_steps: int) -> Taken:
        """Runs some steps."""
        answer = self.ask(str(n_steps))
        return Taken(answer["seconds"], answer["cpu_seconds"])


def report(config: ConfigDict, sides: "dict[str, Ours | Peer]", taken: dict[str, list[Taken]], n_steps: int) -> None:
    """Prints the medians and their ratio."""
    rl = config.rl
    tokens = rl.questions * rl.answers * rl.longest_answer * n_steps
    print(
        f"{config.name}: {rl.questions} prompts of {rl.longest_prompt} tokens x {rl.answers} answers of "
        f"{rl.longest_answer}, {rl.updates} updates; {len(taken['deepseek_jax'])} turns of {n_steps}"
    )
    rates = {}
    for name, side in sides.items():
        wall, cpu = (tokens / statistics.median(one) for one in zip(*taken[name], strict=True))
        rates[name] = wall, cpu
        spread = sorted(tokens / one.wall for one in taken[name])
        print(
            f"  {name:<13} {wall:9,.0f} tokens/s (slowest {spread[0]:,.0f}, fastest {spread[-1]:,.0f}), {cpu:9,.0f} "
            f"tokens/CPU s  {side.n_params / 1e6:.2f}M parameters  {side.title}"
        )
    report_parts(sides["deepseek_jax"], len(taken["deepseek_jax"]) * n_steps)
    if len(rates) == 2:
        wall, cpu = (ours / theirs for ours, theirs in zip(rates["deepseek_jax"], rates["trl"], strict=True))
        print(f"  ratio of the medians: {wall:.2f} by the clock, {cpu:.2f} in CPU time")


def report_parts(ours: Any, n_steps: int) -> None:
    """Prints where our steps spend their time, of the steps that count."""
    from deepseek_jax.train.metrics import memory_gib

    medians = {what: statistics.median(one[what] for one in ours.seconds[-n_steps:]) for what in ours.seconds[-1]}
    memory = memory_gib()
    peak = "" if memory is None else f"; peak memory {binary(int(memory * 2**30))}"
    print(f"  deepseek_jax: {parts_of(medians)}; largest gap of log-probabilities {ours.figures['gap']:.1e}{peak}")


def parts_of(seconds: dict[str, float]) -> str:
    """Returns the parts of a step as text."""
    total = sum(seconds.values())
    return ", ".join(f"{what} {one:.3f} s ({one / total:.0%})" for what, one in seconds.items())

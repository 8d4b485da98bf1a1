"""Meshes on which a network fits, fastest first: what may be chosen, and a search that traces as little as possible.

    choices      pipe x data x context x expert = devices, rules that store weights in shards, micro-batches, remat,
                 recipe
    fits         memory of the fullest device <= (1 - BARELY) of the chip's
    order        seconds per step (`step_time.step` with the recipe's efficiency)

More micro-batches need less memory and more time. So the jobs of a line differ in their micro-batches alone, and the
first job of a line that may fit is its fastest. The search is best first: it takes the fastest such job of all lines
and computes what its layers keep (`ActivationBytes`: a derivative on shapes, seconds of work) for that job only, unless
a job with the same recomputation has already shown that it cannot fit. The first job found is the fastest that fits.
"""

import heapq
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from deepseek_jax.chips import Chip
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import DATA, EXPERT
from deepseek_jax.parallel.sharding import EXPERTS
from deepseek_jax.plan import step_time
from deepseek_jax.plan.activations import ActivationBytes, matmul_outputs
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.layout import Layout
from deepseek_jax.plan.memory import BARELY, capacity, fullest
from deepseek_jax.plan.network import Network
from deepseek_jax.plan.recipes import V3_POLICY, Recipe
from deepseek_jax.plan.schedules import name_of, schedule

# Rules added to the config's own, each a way to store weights in shards that are gathered before use.
STORED: tuple[dict[str, str], ...] = (
    {},
    {"embed": DATA},
    {"heads": EXPERT, "embed": DATA},
    {"vocab": EXPERT, "heads": EXPERT, "embed": DATA},
)
PIPES = (1, 2, 4, 8, 16)
CONTEXTS = (2, 4, 8, 16, 32, 64)  # besides 1
LONG = 4096  # tokens of a sequence that a device has at least, if it shares the sequence with others
NO_BF16 = "gradients summed in place, tokens sent once to each node (recipe bf16)"
NO_V3 = "V3's recomputation (recipe v3)"
MOST_DEVICES = 2**17


@dataclass(frozen=True)
class Space:
    """What is given, and what may be chosen."""

    # network, chip, devices: the network, and the chips it is to run on
    network: Network
    chip: Chip
    devices: int
    # batch, batch_start, seq_len, loss_chunk: `config.batch.size`, `size_start`, `config.data.seq_len`,
    # `config.loss.chunk`
    batch: int
    batch_start: int
    seq_len: int
    loss_chunk: int
    rules: Mapping[str, str]  # `config.sharding`
    recipes: Sequence[Recipe]  # recipes to choose from; their `remat` and number formats differ
    # `kept(recipe, layout, rules)` returns what a layer of each stack keeps; called as rarely as possible
    kept: Callable[[Recipe, Layout, Mapping[str, str]], Mapping[str, ActivationBytes]]
    efficiency: float = 0.0  # efficiency of the matmuls; 0: that of each recipe


@dataclass(frozen=True)
class Suggestion:
    """A job that fits."""

    job: Job
    batch_start: int  # its `config.batch.size_start`
    step_s: float
    memory: float  # bytes on the fullest device


def missing(job: Job) -> list[str]:
    """Returns what `deepseek-jax train` does not support yet but the job needs; empty if it can run the job."""
    if job.recipe.remat == V3_POLICY:
        return [NO_V3]
    return [] if job.recipe.alike else [NO_BF16]


def search(space: Space) -> Iterator[Suggestion]:
    """Yields the suggestions, fastest first, one per mesh and recipe."""
    order = itertools.count()  # breaks ties
    heap = [(step_of(space, job), next(order), job, rest) for job, *rest in lines(space)]
    heapq.heapify(heap)
    known: dict[tuple, Mapping[str, ActivationBytes]] = {}
    found: set[tuple] = set()
    while heap:
        seconds, _, job, rest = heapq.heappop(heap)
        at = job.layout
        mesh = (at.pipe, at.data, at.context, at.expert, job.recipe.activations, job.recipe.fp8)
        if mesh in found:
            continue
        guess = known.get(_alike(job))
        if guess is None or _fits(space, job, guess):
            known[_alike(job)] = kept = space.kept(job.recipe, at, job.rules)
            if _fits(space, job, kept):
                found.add(mesh)
                yield Suggestion(job, start_of(space, job), seconds, fullest(job, kept, space.loss_chunk))
                continue
            guess = kept
        rest = [other for other in rest if _fits(space, other, guess)]
        if rest:
            heapq.heappush(heap, (step_of(space, rest[0]), next(order), rest[0], rest[1:]))


def smallest(space: Space) -> int:
    """Returns the least power of two above `space.devices` on which a job fits; 0 if none does up to MOST_DEVICES."""
    least = [recipe for recipe in space.recipes if recipe.remat in ("block", V3_POLICY)] or space.recipes
    for devices in itertools.takewhile(lambda n: n <= MOST_DEVICES, (2**k for k in itertools.count())):
        if devices > space.devices and next(search(replace(space, devices=devices, recipes=least)), None):
            return devices
    return 0


def step_of(space: Space, job: Job) -> float:
    """Returns the seconds per step, by which suggestions are ordered."""
    return step_time.step(job, space.efficiency or job.recipe.efficiency).total


def start_of(space: Space, job: Job) -> int:
    """Returns `config.batch.size_start`, rounded up to a multiple of the devices times their micro-batches."""
    multiple = job.layout.data * job.layout.expert * job.layout.micro_batches
    return min(ceil(space.batch_start / multiple) * multiple, job.layout.batch)


def lines(space: Space) -> Iterator[list[Job]]:
    """Yields lines of jobs that divide and may fit; the jobs of a line differ in their micro-batches, fewest first."""
    for pipe, context, expert, rules in _meshes(space):
        shared: dict[bool, Job] = {}  # their stages and parts are shared by all jobs on this mesh
        for recipe in space.recipes:
            numbers = _micro_batches(space, pipe, context)
            jobs = (_job(space, pipe, context, expert, rules, recipe, n) for n in numbers)
            line = [job for job in jobs if _divides(job, shared) and _fits(space, job, _least(job))]
            if line:
                yield line


def _divides(job: Job, shared: dict[bool, Job]) -> bool:
    """Returns whether the weights divide over a job's mesh; takes stages and parts from an equal job in `shared`."""
    like = shared.setdefault(job.recipe.fp8, job)
    try:
        job.__dict__.update(stages=like.stages, parts=like.parts)
        if job.shares_vocabulary:
            job.__dict__.update(of_any_rank=like.of_any_rank, laid=like.laid, homes=like.homes)
    except UserError:
        return False
    return True


def _least(job: Job) -> dict[str, ActivationBytes]:
    """Returns a lower bound for every policy: a layer's input, and at work the outputs of its matmuls."""
    width, tokens = job.recipe.activations, job.layout.part_len
    outputs = {name: matmul_outputs(job.network, name) for name in job.network.stacks}
    stream = tokens * width * job.network.stream_width
    return {name: ActivationBytes(stream, 0, tokens * width * made) for name, made in outputs.items()}


def _meshes(space: Space) -> Iterator[tuple[int, int, int, dict[str, str]]]:
    """Yields (pipe, context, expert, rules) that divide the devices; equivalent rules are tried once."""
    pipes = [n for n in PIPES if space.devices % n == 0 and n <= sum(space.network.repeats.values())]
    for pipe, context in itertools.product(pipes, _contexts(space)):
        replicas, n_experts = space.devices // pipe // context, space.network.n_experts
        if (pipe > 1 and context > 1) or space.devices % (pipe * context):
            continue
        for expert in (n for n in range(1, n_experts + 1) if n_experts % n == 0 and replicas % n == 0):
            sizes, seen = {DATA: replicas // expert, EXPERT: expert, "": 1}, set()
            for stored in STORED if pipe == 1 else STORED[:1]:
                rules = dict(space.rules) | {EXPERTS: EXPERT} | stored
                active = tuple(sorted((name, axis) for name, axis in rules.items() if sizes.get(axis, 1) > 1))
                if active not in seen:
                    seen.add(active)
                    yield pipe, context, expert, rules


def _contexts(space: Space) -> list[int]:
    """Returns the numbers of devices that may share a sequence."""
    return [1, *(n for n in CONTEXTS if space.seq_len % (2 * n) == 0 and space.seq_len >= n * LONG)]


def _micro_batches(space: Space, pipe: int, context: int) -> list[int]:
    """Returns the numbers of micro-batches that divide a device's share; in a pipeline one sequence each."""
    share = ceil(space.batch / (space.devices // pipe // context))
    return [share] if pipe > 1 else [n for n in range(1, share + 1) if share % n == 0]


def _job(space: Space, pipe: int, context: int, expert: int, rules: dict, recipe: Recipe, micro_batches: int) -> Job:
    replicas = space.devices // pipe // context
    batch = ceil(space.batch / replicas) * replicas
    layout = Layout(pipe, replicas // expert, expert, batch, micro_batches, space.seq_len, context)
    both_ways = pipe > 1 and micro_batches >= 2 * pipe and 2 * pipe <= sum(space.network.repeats.values())
    name = "dualpipev" if both_ways else "1f1b"
    put_off = 0 if recipe.alike else -1  # what a run's pipeline keeps for W that is put off does not fit
    nodes, rest = divmod(expert, space.chip.reach)
    return Job(
        space.network,
        layout,
        space.chip,
        schedule(name, pipe, micro_batches),
        recipe,
        rules,
        groups=nodes if recipe.alike and nodes > 1 and not rest else 1,  # a token crosses the network once per node
        put_off=put_off,
    )


def _fits(space: Space, job: Job, kept: Mapping[str, ActivationBytes]) -> bool:
    """Returns whether a job fits and leaves memory for what is not counted."""
    return fullest(job, kept, space.loss_chunk) <= (1 - BARELY) * capacity(job)


def _alike(job: Job) -> tuple:
    """Returns a key of jobs whose layers keep about the same."""
    return job.recipe.remat, job.recipe.activations, job.expert_devices > 1, job.layout.context


def schedule_name(job: Job) -> str:
    """Returns the name of a job's schedule, as given to --schedule."""
    return name_of(job.schedule)

"""What a report is made from, besides the job: the model, and what the command line asks about it."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from deepseek_jax.plan.activations import ActivationBytes
from deepseek_jax.plan.counts import Counts
from deepseek_jax.plan.job import Job
from deepseek_jax.plan.memory import by_rank
from deepseek_jax.plan.network import EMBEDDING, HEAD, MTP, Network
from deepseek_jax.plan.published import Run
from deepseek_jax.plan.rollout import Drawing


@dataclass(frozen=True)
class PlannedModel:
    """A network and what is known about it."""

    name: str  # of the config
    network: Network
    counts: Counts
    cache_bytes: int  # of the key-value cache, per token
    fp8_cache_bytes: int | None  # of the cache in FP8, per token; None if the model has none
    run: Run | None  # the published run of this model, or None


@dataclass(frozen=True)
class PlanOptions:
    """Options of a report."""

    kept: Mapping[str, ActivationBytes]  # what a layer keeps for the backward pass (`activations.kept`)
    loss_chunk: int  # tokens whose logits exist at a time
    # efficiency, efficiency_mark: efficiency of the calibrated column, and whether it is fitted or given
    efficiency: float
    efficiency_mark: str
    # step_s, step_mark: a measured step and where it is from; None for no such column
    step_s: float | None
    step_mark: str
    # tokens, tokens_mark: tokens of the whole run, and where that number is from
    tokens: float
    tokens_mark: str
    dollars: float  # price per GPU hour
    against: PlannedModel | None  # a model to compare with, or None
    load_LE: np.ndarray | None = None  # measured tokens of each expert in each layer, or None
    drawing: Drawing | None = None  # how a step of reinforcement learning draws answers; None: no such step


def memory_of(job: Job, options: PlanOptions) -> list[dict[str, float]]:
    """Returns bytes by part on a device of each pipeline rank."""
    return by_rank(job, options.kept, options.loss_chunk)


def contents(job: Job, rank: int) -> str:
    """Returns a description of what a pipeline rank holds: "4 + 3 layers, head"."""
    stages = [job.stages[share.stage] for share in job.ranks[rank]]
    parts = {w.part for stage in stages for w in stage.weights}
    names = ((EMBEDDING, "embedding"), (HEAD, "head"), (MTP, "multi-token prediction"))
    ends = [name for part, name in names if part in parts]
    layers = " + ".join(str(stage.n_layers) for stage in stages)
    return f"{layers} layers" + (f", {', '.join(ends)}" if ends else "")

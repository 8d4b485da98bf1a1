"""Bytes per device while the answers of a step of reinforcement learning are drawn (`rl.rollout`).

| part | bytes |
| --- | --- |
| train state | float32 weights, moments and router biases, which stay where they are (`memory.between_steps`) |
| reference | the float32 weights once more, divided likewise, if the objective has a divergence from one |
| weights | as a step reads them, whole but for experts on other devices; none where that is the float32 weights |
| cache | of keys and values, or latents, of all answers that a device draws at a time, at their greatest length |
| logits | of one token of each: float32, as drawn from and as log-probabilities |

Drawing and updating take turns: the larger of this and the update's memory is what has to fit, and the update has the
reference beside it. Activations of the prompts are not counted.

With `rl.rollout=engine` the rows of a time share a pool of pages, which holds no more than the cache above. The engine
keeps it, and the weights that it has prepared, through the update: add both to the update's memory, for which they are
not counted.
"""

from dataclasses import dataclass

from deepseek_jax.plan.job import Job, Part
from deepseek_jax.plan.memory import between_steps
from deepseek_jax.plan.recipes import MASTER

BFLOAT16 = 2.0  # bytes, in which a network's cache is stated
LOGITS = 8.0


@dataclass(frozen=True)
class Drawing:
    """How answers are drawn."""

    rows: int  # answers at a time, over all devices
    tokens: int  # of the longest prompt and its longest answer
    has_reference: bool
    cache_bytes: float  # per token, in bfloat16


def memory(job: Job, drawing: Drawing) -> dict[str, float]:
    """Returns bytes by part on a device; all hold the same."""
    rows = drawing.rows / job.layout.devices
    parts = [part for stage in job.parts for part in stage]
    cache = rows * drawing.tokens * drawing.cache_bytes * job.recipe.activations / BFLOAT16
    found = {"train_state": between_steps(job, 0), "reference": reference(job) * drawing.has_reference}
    found |= {"weights": sum(_read(job, part) for part in parts), "cache": cache}
    found["logits"] = rows * job.network.vocab_size * LOGITS
    return {name: n_bytes for name, n_bytes in found.items() if n_bytes}


def reference(job: Job) -> float:
    """Returns the bytes of a second copy of the float32 weights."""
    return MASTER * sum(part.optimizer_numbers for stage in job.parts for part in stage)


def _read(job: Job, part: Part) -> float:
    """Returns the bytes of a weight made for the drawing: gathered from shards, or cast."""
    if part.place.is_sharded and not part.weight.is_expert:
        return part.weight.size * job.read(part)
    weights, master = job.held(part)
    return weights if master else 0.0

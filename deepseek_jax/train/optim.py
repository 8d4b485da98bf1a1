"""AdamW as V3 uses it, and its learning-rate schedule.

    rate:  0 -> peak (linear)  |  peak  |  peak -> tail (cosine)  |  tail  |  final

Weight decay shrinks matrices and tables; it spares gains and biases (`layers.base.vector`).  Paper: V3 section 4.2.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from jax.typing import DTypeLike

LAST = 2**31 - 1  # step that int32 counts to


@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and its schedule; steps are training steps.

    Attributes:
        peak_rate: learning rate after warm-up (V3: 2.2e-4).
        warmup_steps: linear from 0 (2,000).
        constant_steps: at `peak_rate` (to 10T tokens).
        cosine_steps: from `peak_rate` to `tail_rate` (over 4.3T tokens).
        tail_rate, tail_steps: first constant tail (2.2e-5 for 333B tokens).
        final_rate: from there on (7.3e-6 for 167B tokens).
        beta1, beta2, eps: Adam's.
        weight_decay: decoupled, times the learning rate (0.1).
        clip_norm: largest global norm of the gradients (1.0).
        moments_dtype: dtype in which both moments are kept (bfloat16).
    """

    peak_rate: float
    warmup_steps: int
    constant_steps: int
    cosine_steps: int
    tail_rate: float
    tail_steps: int
    final_rate: float
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip_norm: float
    moments_dtype: DTypeLike


def learning_rate(c: OptimizerConfig) -> optax.Schedule:
    """The learning rate as a function of the step."""
    schedules = [
        optax.linear_schedule(0.0, c.peak_rate, max(c.warmup_steps, 1)),
        optax.constant_schedule(c.peak_rate),
        optax.cosine_decay_schedule(c.peak_rate, max(c.cosine_steps, 1), alpha=c.tail_rate / c.peak_rate),
        optax.constant_schedule(c.tail_rate),
        optax.constant_schedule(c.final_rate),
    ]
    ends, end = [], 0
    for steps in (c.warmup_steps, c.constant_steps, c.cosine_steps, c.tail_steps):
        end = min(end + steps, LAST)
        ends.append(end)
    return optax.join_schedules(schedules, ends)


def init_moments(c: OptimizerConfig, params: dict) -> dict:
    """Adam's state before the first step: {"count", "mu", "nu"}, the moments in `moments_dtype`."""
    return _kept(optax.scale_by_adam(c.beta1, c.beta2, c.eps).init(params), c.moments_dtype)


def adamw_update(c: OptimizerConfig, gradients: dict, moments: dict, params: dict, decayed: dict, rate) -> tuple:
    """One step: m, v <- moments of g;  w <- w - rate * (m^ / (sqrt(v^) + eps) + weight_decay * w).

    Args:
        c: the recipe.
        gradients, params: float32 trees, or a device's parts of them.
        moments: as `init_moments` gives.
        decayed: tree of bools, the weights that decay (`layers.base.decayed`).
        rate: learning rate of this step.

    Returns:
        (new params, new moments).
    """
    adam = optax.scale_by_adam(c.beta1, c.beta2, c.eps)
    state = optax.ScaleByAdamState(**moments | _cast({k: moments[k] for k in ("mu", "nu")}, jnp.float32))
    updates, state = adam.update(gradients, state)
    updates, _ = optax.add_decayed_weights(c.weight_decay, decayed).update(updates, optax.MaskedState(()), params)
    return jax.tree.map(lambda w, u: w - rate * u, params, updates), _kept(state, c.moments_dtype)


def _cast(tree: object, dtype: DTypeLike) -> object:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _kept(state: optax.ScaleByAdamState, dtype: DTypeLike) -> dict:
    return {"count": state.count, "mu": _cast(state.mu, dtype), "nu": _cast(state.nu, dtype)}

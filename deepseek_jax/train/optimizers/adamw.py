"""AdamW: m, v <- moments of g;  w <- w - rate * (m^ / (sqrt(v^) + eps) + weight_decay * w).

Weight decay shrinks matrices and tables; it spares gains and biases (`layers.base.vector`). Paper: V3 section 4.2.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.typing import DTypeLike

from deepseek_jax.layers.base import Tree, decayed


@dataclass(frozen=True)
class AdamW:
    """An `Optimizer`; its state is {"count", "mu", "nu"}: a counter, and both moments, like the weights."""

    decayed: Tree  # tree of bools like the weights (it may have more): those that decay
    # beta1, beta2, eps: Adam's
    beta1: float
    beta2: float
    eps: float
    weight_decay: float  # decoupled, times the learning rate (V3: 0.1)
    moments_dtype: DTypeLike  # dtype in which both moments are kept (bfloat16)

    def init(self, params: Tree) -> dict[str, Tree]:
        """The state before the first step."""
        return self._kept(self._adam().init(params))

    def update(self, gradients: Tree, state: dict[str, Tree], params: Tree, rate: jax.Array) -> tuple[Tree, dict]:
        """One step: see `Optimizer.update`."""
        moments = {key: _cast(state[key], jnp.float32) for key in ("mu", "nu")}
        updates, kept = self._adam().update(gradients, optax.ScaleByAdamState(**state | moments))
        decays = _like(params, self.decayed)
        updates, _ = optax.add_decayed_weights(self.weight_decay, decays).update(updates, optax.MaskedState(()), params)
        return jax.tree.map(lambda w, u: w - rate * u, params, updates), self._kept(kept)

    def _adam(self) -> optax.GradientTransformation:
        return optax.scale_by_adam(self.beta1, self.beta2, self.eps)

    def _kept(self, state: optax.ScaleByAdamState) -> dict[str, Tree]:
        dtype = self.moments_dtype
        return {"count": state.count, "mu": _cast(state.mu, dtype), "nu": _cast(state.nu, dtype)}


def adamw(
    beta1: float, beta2: float, eps: float, weight_decay: float, moments_dtype: DTypeLike
) -> Callable[[nnx.Module, Tree], AdamW]:
    """AdamW for the weights of a model, which were declared with or without decay; arguments as `AdamW`'s."""
    return lambda model, places: AdamW(decayed(model), beta1, beta2, eps, weight_decay, moments_dtype)


def _cast(tree: Tree, dtype: DTypeLike) -> Tree:
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def _like(tree: Tree, larger: Tree) -> Tree:
    """The part of `larger` that has the paths of `tree`."""
    return {key: _like(sub, larger[key]) for key, sub in tree.items()} if isinstance(tree, dict) else larger

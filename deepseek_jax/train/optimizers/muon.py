"""Muon for matrices, AdamW for the rest: the momentum of a matrix, with all its singular values set to one.

    M <- mu M + G                                           momentum
    O  = HNS(mu M + G) * sqrt(max(n, m)) * gamma            Nesterov; the root mean square of an update is about gamma
    W <- W - rate * (O + weight_decay * W)

HNS, ten steps of Newton-Schulz, brings a matrix to its polar factor U V^T. Eight steps with coefficients that lift
small singular values fast, then two that settle at 1:

    X <- G / |G|;  then  X <- a X + b (X X^T) X + c (X X^T)^2 X

Matrices are all weights but embedding, head, gains, biases and adapters, which AdamW updates. A stack of layers or of
experts is as many matrices; the heads of a projection are one. `optax.contrib.muon` corrects the bias of its momentum,
which the published method does not, and takes the parts that devices hold for matrices.

Paper: V4, on Muon; Jordan et al. 2024; Liu et al. 2025 (arXiv 2502.16982) on the root mean square.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx
from flax.traverse_util import flatten_dict
from jax.typing import DTypeLike

from deepseek_jax.layers.base import BY_ADAMW, Tree, logical_axes, matrix_axes, roles
from deepseek_jax.parallel.sharding import Placement
from deepseek_jax.parallel.zero import by_matrix
from deepseek_jax.train.optimizers.adamw import AdamW, adamw
from deepseek_jax.train.trainable import Path, divide, join

COEFFICIENTS = (*[(3.4445, -4.7750, 2.0315)] * 8, *[(2.0, -1.5, 0.5)] * 2)  # (a, b, c) of each step
AT_ONCE = 2**26  # numbers of the matrices that are made orthogonal at a time; a step holds a few times as many
TINY = 1e-30  # least norm that a matrix is divided by, so that zeros remain zeros


@dataclass(frozen=True)
class Muon:
    """An `Optimizer`; its state is {"count", "mu", "nu"}: AdamW's, with M in "mu" and nothing in "nu" for matrices."""

    adamw: AdamW  # for all other weights; its weight decay and the dtype of its moments are those of matrices too
    matrices: dict[Path, tuple[int, int]]  # of each: (axes of the stack, axes that are contracted)
    places: dict[Path, Placement]  # where each weight lies
    momentum: float  # mu (V4: 0.95)
    rms: float  # gamma (V4: 0.18)

    def init(self, params: Tree) -> dict[str, Tree]:
        """The state before the first step."""
        matrices, others = divide(params, self._is_matrix)
        state, dtype = self.adamw.init(others), self.adamw.moments_dtype
        return state | {"mu": join(jax.tree.map(lambda w: jnp.zeros(w.shape, dtype), matrices), state["mu"])}

    def update(self, gradients: Tree, state: dict[str, Tree], params: Tree, rate: jax.Array) -> tuple[Tree, dict]:
        """One step: see `Optimizer.update`."""
        (g, other_g), (m, other_m), (w, others) = (
            divide(tree, self._is_matrix) for tree in (gradients, state["mu"], params)
        )
        others, adam = self.adamw.update(other_g, state | {"mu": other_m}, others, rate)
        m = jax.tree.map(lambda m, g: self.momentum * m.astype(jnp.float32) + g, m, g)
        o = jax.tree_util.tree_map_with_path(self._orthogonal, jax.tree.map(lambda m, g: self.momentum * m + g, m, g))
        w = jax.tree.map(lambda w, o: w - rate * (o + self.adamw.weight_decay * w), w, o)
        m = jax.tree.map(lambda m: m.astype(self.adamw.moments_dtype), m)
        return join(w, others), adam | {"mu": join(m, adam["mu"])}

    def _is_matrix(self, path: Path) -> bool:
        return path in self.matrices

    def _orthogonal(self, keys: tuple, part: jax.Array) -> jax.Array:
        """This device's part of O for the weight at a path, from its part of mu M + G."""
        path = tuple(key.key for key in keys)
        n_stacked, n_in = self.matrices[path]

        def change(stack: jax.Array) -> jax.Array:
            rows, columns = (math.prod(sides) for sides in (stack.shape[1 : 1 + n_in], stack.shape[1 + n_in :]))
            found = orthogonalized(stack.reshape(-1, rows, columns)) * (self.rms * math.sqrt(max(rows, columns)))
            return found.reshape(stack.shape)

        return by_matrix(change, part, self.places[path], n_stacked)


def muon(
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    moments_dtype: DTypeLike,
    momentum: float,
    rms: float,
) -> Callable[[nnx.Module, Tree], Muon]:
    """Muon for the matrices of a model; the arguments are `Muon`'s, the first ones those of its `AdamW`."""

    def of(model: nnx.Module, places: Tree) -> Muon:
        others = adamw(beta1, beta2, eps, weight_decay, moments_dtype)(model, places)
        return Muon(others, matrices_of(model), flatten_dict(places), momentum, rms)

    return of


def matrices_of(model: nnx.Module) -> dict[Path, tuple[int, int]]:
    """The weights of a model that Muon updates: path -> (axes of the stack, axes that are contracted)."""
    axes, role_of = flatten_dict(logical_axes(model)[0]), flatten_dict(roles(model))
    found = {path: matrix_axes(axes[path]) for path, role in role_of.items() if role not in BY_ADAMW}
    for path in found:
        if role_of[path] == "mixing":  # of all streams of the residual connection, side by side (V4)
            found[path] = found[path][0], len(axes[path]) - found[path][0] - 1
    return found


def orthogonalized(stack: jax.Array, at_once: int = AT_ONCE) -> jax.Array:
    """The polar factors U V^T of matrices G = U S V^T, [n, rows, columns], float32: HNS, each matrix by itself.

    Singular values below about 1e-4 of a matrix's norm are not lifted all the way to 1. Matrices of more than `at_once`
    numbers together are worked through a few at a time.
    """
    n, rows, columns = stack.shape
    if not stack.size:
        return stack
    x = stack if rows <= columns else stack.mT  # the smaller product X X^T
    norms = jnp.sqrt(jnp.sum(jnp.square(x), axis=(1, 2), keepdims=True))
    x = x / jnp.maximum(norms, TINY)
    some = max(at_once // (rows * columns), 1)
    x = _newton_schulz(x) if n <= some else jax.lax.map(_newton_schulz, x, batch_size=some)
    return x if rows <= columns else x.mT


def _newton_schulz(x: jax.Array) -> jax.Array:
    """All steps, for matrices [..., rows, columns] with rows <= columns and norm 1."""

    def step(x: jax.Array, coefficients: jax.Array) -> tuple[jax.Array, None]:
        a, b, c = coefficients
        xx = x @ x.mT
        return a * x + (b * xx + c * (xx @ xx)) @ x, None

    return jax.lax.scan(step, x, jnp.array(COEFFICIENTS))[0]

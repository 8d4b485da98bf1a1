"""The public function: arguments are checked once, then the named implementation runs."""

import functools

import jax
import jax.numpy as jnp

from pallas_kernels.sinkhorn import reference

IMPLEMENTATIONS = ("reference", "triton")


def doubly_stochastic(logits: jax.Array, n_steps: int, eps: float, *, implementation: str) -> jax.Array:
    """Positive matrices whose rows and columns sum to about 1, of the exponentials of logits (Sinkhorn and Knopp 1967).

    The first of `n_steps` times the rows are normalised by a softmax; the columns come last, and so are exact to eps.
    Gradients are those of the definition.

    Args:
        logits: float32 [O, J, ...], the axes of a matrix first.
        n_steps: times that rows and columns are normalised, 1 or more.
        eps: added to what the softmax gives, and to each sum that divides.
        implementation: "reference" (any device) or "triton" (NVIDIA GPUs). There is no fallback from one to another.

    Returns float32 of the shape of `logits`.

    Raises:
        ValueError: arguments that do not fit together, or that the implementation does not support.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"implementation={implementation!r}: unknown. Choose one of {', '.join(IMPLEMENTATIONS)}.")
    if logits.ndim < 2 or 0 in logits.shape or logits.dtype != jnp.float32 or n_steps < 1:
        raise ValueError(
            f"logits {logits.dtype} {logits.shape}, n_steps={n_steps}: expected float32 [O, J, ...], no empty axis, "
            "n_steps > 0."
        )
    if implementation == "reference":
        return reference.doubly_stochastic(logits, n_steps, eps)
    if jax.default_backend() != "gpu":
        raise ValueError(f"implementation='triton' on {jax.default_backend()}: needs an NVIDIA GPU.")
    return _in_one_pass(logits, n_steps, eps)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _in_one_pass(logits: jax.Array, n_steps: int, eps: float) -> jax.Array:
    from pallas_kernels.sinkhorn import gpu  # not part of every JAX build

    return gpu.doubly_stochastic(logits, n_steps, eps)


def _forward(logits: jax.Array, n_steps: int, eps: float) -> tuple[jax.Array, jax.Array]:
    return _in_one_pass(logits, n_steps, eps), logits


def _backward(n_steps: int, eps: float, logits: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    return jax.vjp(lambda logits: reference.doubly_stochastic(logits, n_steps, eps), logits)[1](g)


_in_one_pass.defvjp(_forward, _backward)

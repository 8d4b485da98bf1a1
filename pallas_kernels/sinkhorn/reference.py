"""Sinkhorn's normalisation, as defined, in plain jax.numpy.

A GPU takes three kernels and a check for each of the turns of its loop, whatever the size: with a few tokens these are
launches that wait for one another.
"""

import jax
import jax.numpy as jnp


def doubly_stochastic(logits: jax.Array, n_steps: int, eps: float) -> jax.Array:
    """See `pallas_kernels.sinkhorn`."""
    made = jax.nn.softmax(logits, axis=1) + eps
    made = made / (jnp.sum(made, axis=0) + eps)

    def step(made: jax.Array, _: None) -> tuple[jax.Array, None]:
        made = made / (jnp.sum(made, axis=1, keepdims=True) + eps)
        return made / (jnp.sum(made, axis=0) + eps), None

    return jax.lax.scan(step, made, None, length=n_steps - 1)[0]

"""Many small feed-forwards at once: rows are sorted by expert, padded to blocks, and each block meets its expert's weights.

A block holds `J` rows of one expert.  The number of blocks depends on shapes alone (A / J + X bounds it for any routing),
so nothing is dropped and nothing is recompiled; at most J - 1 rows an expert are padding.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.precision.matmul import einsum


class Blocks(NamedTuple):
    """Which assignment stands where.

    Attributes:
        expert_I: expert of each block; X for blocks that are not used.
        assignment_IJ: assignment in each row of each block; A where the row is empty.
        slot_A: the row (of I * J) of each assignment; I * J for assignments to no expert.
    """

    expert_I: jax.Array
    assignment_IJ: jax.Array
    slot_A: jax.Array


def arrange(expert_A: jax.Array, n_experts: int, block: int) -> Blocks:
    """Sorts assignments into blocks of `block` rows of one expert each; expert `n_experts` means none."""
    n_assignments = expert_A.shape[0]
    n_blocks = n_assignments // block + min(n_experts, n_assignments)
    order_A = jnp.argsort(expert_A, stable=True)
    sorted_A = expert_A[order_A]
    count_X = jnp.bincount(expert_A, length=n_experts + 1)
    blocks_X = -(-count_X // block)
    first_row_X = jnp.cumsum(count_X) - count_X
    first_block_X = jnp.cumsum(blocks_X) - blocks_X
    slot_of_sorted = first_block_X[sorted_A] * block + jnp.arange(n_assignments) - first_row_X[sorted_A]
    slot_of_sorted = jnp.where(sorted_A == n_experts, n_blocks * block, slot_of_sorted)
    assignment = jnp.full((n_blocks * block,), n_assignments, jnp.int32).at[slot_of_sorted].set(order_A, mode="drop")
    slot_A = jnp.zeros((n_assignments,), jnp.int32).at[order_A].set(slot_of_sorted)
    ends_X = jnp.cumsum(blocks_X[:-1])
    expert_I = jnp.searchsorted(ends_X, jnp.arange(n_blocks), side="right")
    return Blocks(expert_I, assignment.reshape(n_blocks, block), slot_A)


def grouped_swiglu(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    *,
    gate_XDF: jax.Array,
    up_XDF: jax.Array,
    down_XFD: jax.Array,
    block: int = 64,
) -> jax.Array:
    """y_m = sum_k weights_mk * SwiGLU_experts_mk(x_m).

    Args:
        x_MD: tokens.
        experts_MK: experts of each token, 0..X-1; X means none.
        weights_MK: factor of each expert's output.
        gate_XDF, up_XDF, down_XFD: the experts' weights.
        block: rows of one block.

    Returns:
        y_MD in the dtype of `x_MD`.
    """
    n_experts, top_k = gate_XDF.shape[0], experts_MK.shape[1]
    blocks = arrange(experts_MK.reshape(-1), n_experts, block)
    x_IJD = jnp.take(x_MD, blocks.assignment_IJ // top_k, axis=0, mode="fill", fill_value=0)
    expert_I = jnp.minimum(blocks.expert_I, n_experts - 1)
    hidden_IJF = jax.nn.silu(einsum("IJD,IDF->IJF", x_IJD, gate_XDF[expert_I]))
    hidden_IJF = hidden_IJF * einsum("IJD,IDF->IJF", x_IJD, up_XDF[expert_I])
    y_IJD = einsum("IJF,IFD->IJD", hidden_IJF, down_XFD[expert_I])
    y_AD = jnp.take(y_IJD.reshape(-1, y_IJD.shape[-1]), blocks.slot_A, axis=0, mode="fill", fill_value=0)
    y_MKD = y_AD.reshape(*experts_MK.shape, -1)
    return jnp.einsum("MKD,MK->MD", y_MKD, weights_MK.astype(y_MKD.dtype))

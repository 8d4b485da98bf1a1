"""What is kept and what is computed in which dtype.

| what | dtype |
| --- | --- |
| master weights, gradients that are summed, optimizer update | float32 |
| activations and matmul operands | `Policy.compute` |
| weights as products read them, cast once per step, and the gradients of one micro-batch | `Policy.weights` |
| norms, rotary angles, router scores, softmax, cross-entropy | float32, cast where they are computed |
| products with the weights of blocks, under "fp8" | E4M3 in blocks (`precision.fp8`) |
| weights of routed experts, under "fp4" | rounded to E2M1 in blocks of 32, then E4M3 (`precision.fp4`) |
| queries and keys of V4's indexer, under "fp4" | turned, rounded to E2M1 in blocks of 32 (`layers.entry_codes`) |
| these weights, where devices keep parts of them, as a step gathers and keeps them | E4M3 (`precision.coded`) |

The activations carry the compute dtype from the embedding on; there is no autocast.
Paper: V3 section 3.3.1 (which operators stay in high precision).
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.precision.fp4 import Fp4Experts
from deepseek_jax.precision.fp8 import POWERS_OF_TWO, BlockMatmul
from deepseek_jax.precision.matmul import Matmul, PlainMatmul


@dataclass(frozen=True)
class Policy:
    """The number formats of a run."""

    compute: DTypeLike  # dtype of the activations
    # makes what multiplies them with weights, from the kernels it may use
    matmul: Callable[[Kernels], Matmul] = PlainMatmul
    weights: DTypeLike = jnp.float32  # dtype of the weights that `matmul` is given


POLICIES = {
    "fp32": Policy(jnp.float32),
    "bf16": Policy(jnp.bfloat16, weights=jnp.bfloat16),
    "fp8": Policy(jnp.bfloat16, BlockMatmul),
    "fp4": Policy(jnp.bfloat16, Fp4Experts),
}
IN_CODES = ("fp8", "fp4")  # those whose products are in FP8


def policy(name: str, fp8: Mapping[str, Any] = MappingProxyType({})) -> Policy:
    """Returns the policy called `name`; raises UserError for an unknown one.

    "fp8" and "fp4" take the options of `config.fp8`: `Policy.weights`, and the others of `BlockMatmul`; the scales of
    "fp4" are powers of two whatever these say.
    """
    if name not in POLICIES:
        raise UserError(f"config.precision={name!r}: no such precision. Choose one of {', '.join(POLICIES)}.")
    if name not in IN_CODES or not fp8:
        return POLICIES[name]
    options = dict(fp8) | ({"scale": POWERS_OF_TWO} if name == "fp4" else {})
    weights = jnp.dtype(options.pop("weights"))
    return replace(POLICIES[name], matmul=functools.partial(POLICIES[name].matmul, **options), weights=weights)

"""What is kept in which format while training, and what is recomputed.

| recipe | weights | gradients | optimiser, cut over replicas (ZeRO-1) | matmuls | recomputed |
| --- | --- | --- | --- | --- | --- |
| run | float32 | float32 | moments as config.optimizer says | as config.precision says | as config.train.remat says |
| bf16 | bfloat16 | float32 | float32 weights, moments likewise | bfloat16 | likewise |
| v3 | bfloat16, FP8 of blocks' matrices | float32 | float32 weights, bfloat16 moments | FP8 | norms, up-projections |

`run` is what `deepseek-jax train` does.  `v3` is the report's: sections 3.2.3 (recomputation), 3.3.2 (what stays in
higher precision) and 3.3.3 (formats of what is kept and sent); that the FP8 weights stay beside the bfloat16 ones is
assumed, for the report does not say.

Each has one efficiency, what its matmuls reach of their peak, fitted to one measurement:

| recipe | efficiency | gives | measured |
| --- | --- | --- | --- |
| v3 | 0.28 of FP8 | 19.8 s | 19.926 s, V3's step on 2,048 H800 (arXiv 2505.09343, table 4) |
| bf16 | 0.375 | 173.2 K GPU hours | 172.8 K for 10^12 tokens of V2 (its report, section 3.1.3) |
| run | 0.22 | 0.28, 0.67, 1.17 s | 0.32, 0.63, 1.14 s, our own step on one H200 |

(V2's with all of a layer recomputed; ours with V3's widths, 3 layers, 32 experts, under policies none, block and dots
with 1, 2 and 4 sequences.)  An efficiency stands for everything between a peak rate and a real matmul: quantising,
routing, memory-bound operators, multiprocessors given to communication, imbalance.  So it is no prediction for what it
was fitted to, and carried over, unverified, to all else.  One trial: for the 67B model on 512 H800 in 8 stages (its own
layout was not told) bf16 gives a fifth more hours than the 300.6 K published if nothing is recomputed, half as many
again if all is.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.alltoall import HEADROOM
from deepseek_jax.precision.policy import policy

FP8 = 1 + 4 / 128  # a number in tiles of 128 with a float32 scale
INDEX = 8  # bytes of an expert's index and its weight, which we send with a token for each expert it chose
V3_POLICY = "v3"


@dataclass(frozen=True)
class Recipe:
    """Bytes of a number, and choices.

    Attributes:
        weights: as they stay on a device, between the shards of the optimiser.
        gradients: as they are summed.
        optimizer: all that the optimiser keeps of a weight, cut over its replicas.
        gathered: of a weight that is sent round after an update.
        activations: of a number of the residual stream.
        remat: what is kept for the backward pass: none, dots or block (see `layers.base.Execution`), or v3.
        dispatch, combine: of a number sent to an expert and back.
        low_precision_copy: of a number of the blocks' matrices, beside `weights`.
        fp8: whether the blocks' matmuls run in FP8; head, routers and attention never do.
        sent_beside: bytes that go with a token for each expert it chose.
        padding: size of the exchange buffers over a balanced load.
        node_limited: whether a token crosses the network once for each node, and spreads over the fast link there.
        backward_exchanges: exchanges of a layer's backward pass, in those of its forward pass.
        efficiency, fitted_to: what matmuls reach of their peak, and the measurement which that was fitted to.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    remat: str
    dispatch: float
    combine: float
    efficiency: float
    fitted_to: str
    low_precision_copy: float = 0.0
    fp8: bool = False
    sent_beside: int = 0
    padding: float = 1.0
    node_limited: bool = False
    backward_exchanges: int = 1

    @property
    def exchanged(self) -> float:
        """Bytes of a number of the residual stream on its way to an expert and back."""
        return self.dispatch + self.combine


NAMES = ("run", "bf16", "v3")


def recipe(name: str, *, precision: str, moments_dtype: str, remat: str) -> Recipe:
    """The recipe called `name`, with what the config says. Raises UserError for an unknown one, or precision."""
    moments, width = 2.0 * jnp.dtype(moments_dtype).itemsize, float(jnp.dtype(policy(precision).compute).itemsize)
    bf16 = Recipe(
        weights=2.0,
        gradients=4.0,
        optimizer=4.0 + moments,
        gathered=2.0,
        activations=2.0,
        remat=remat,
        dispatch=2.0,
        combine=2.0,
        efficiency=0.375,
        fitted_to="V2's published GPU hours",
        node_limited=True,
    )
    match name:
        case "run":
            return Recipe(
                weights=4.0,
                gradients=4.0,
                optimizer=moments,
                gathered=4.0,
                activations=width,
                remat=remat,
                dispatch=width,
                combine=width,
                efficiency=0.22,
                fitted_to="our own step on one H200",
                sent_beside=INDEX,
                padding=HEADROOM[0],
                backward_exchanges=2,  # one is repeated where the backward pass recomputes (`parallel.alltoall`)
            )
        case "bf16":
            return bf16
        case "v3":
            return replace(
                bf16,
                low_precision_copy=1.0,
                optimizer=4.0 + 2 * 2.0,
                remat=V3_POLICY,
                dispatch=FP8,
                fp8=True,
                efficiency=0.28,
                fitted_to="V3's published step on H800",
            )
    raise UserError(f"--recipe={name}: no such recipe. Choose one of {', '.join(NAMES)}.")

"""Number formats while training, and what is recomputed.

| recipe | weights | gradients | moments | matmuls | recomputed |
| --- | --- | --- | --- | --- | --- |
| run | per config.precision | float32 | per config.optimizer | per config.precision | per config.run.remat |
| bf16 | bfloat16 | float32 | per config.optimizer | bfloat16 | per config.run.remat |
| v3 | bfloat16, FP8 of blocks' matrices | float32 | bfloat16 | FP8 | norms, up-projections |

All keep float32 weights as well; these and the moments are divided over the replicas (ZeRO-1). `run` is what
`deepseek-jax train` does: norms and routers read the float32 weights, and so does everything in precision fp32; the
gradients of one micro-batch have the dtype of the weights. In precision fp8 weights of which devices keep parts are
gathered and read in codes. `v3` follows the report: sections 3.2.3 (recomputation),
3.3.1 (what stays in higher precision) and 3.3.3 (formats of what is kept and sent). We assume that the FP8 weights are
kept beside the bfloat16 ones; the report does not say.

Each recipe has one efficiency, the fraction of the peak that its matmuls reach, fitted to one measurement:

| recipe | efficiency | predicts | measured |
| --- | --- | --- | --- |
| v3 | 0.28 of FP8 | 19.8 s | 19.926 s, V3's step on 2,048 H800 (arXiv 2505.09343, table 4) |
| bf16 | 0.375 | 173.2 K GPU hours | 172.8 K for 10^12 tokens of V2 (its report, section 3.1.3) |
| run | 0.22 | 0.28, 0.67, 1.17 s | 0.32, 0.63, 1.14 s, our own step on one H200 |

(V2 with every layer recomputed; ours with V3's widths, 3 layers, 32 experts, under policies none, block and dots with
1, 2 and 4 sequences.) An efficiency stands for everything between a peak rate and a real matmul: quantization, routing,
memory-bound operators, multiprocessors used for communication, imbalance. It predicts nothing about the run it was
fitted to, and is extrapolated, unverified, to everything else, that of run also to precision fp8. One check: for the
67B model on 512 H800 in 8 stages (its own layout is not published) bf16 predicts 20 % more hours than the published
300.6 K without recomputation, and 50 % more with full recomputation.
"""

from dataclasses import dataclass, replace

import jax.numpy as jnp

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import BY_ADAMW, CONVERTED, MULTIPLIED
from deepseek_jax.parallel.alltoall import HEADROOM
from deepseek_jax.precision.policy import IN_CODES, policy

FP8 = 1 + 4 / 128  # a number in tiles of 128 with a float32 scale
SENT = 1 + 1 / 128  # the same with a scale of one byte (`precision.wire`)
CODED = 1 + 4 / 128**2  # a number of a weight, whose blocks of 128 x 128 have a float32 scale (`precision.coded`)
MASTER = 4.0  # bytes of a float32 weight
INDEX = 8  # bytes of an expert's index and its weight, sent with a token for each chosen expert
V3_POLICY = "v3"


@dataclass(frozen=True)
class Recipe:
    """Bytes per number, and choices."""

    # weights, ends, others: bytes per number, as a step reads it, of what matmuls multiply, of embedding and head, and
    # of gains, biases and routers
    weights: float
    ends: float
    others: float
    moments: float  # bytes per number of both moments; kept beside the float32 weights, divided over the replicas
    activations: float  # bytes per number of the residual stream
    remat: str  # what is kept for the backward pass: none, dots or block (see `layers.base.Execution`), or v3
    # dispatch, combine: bytes per number sent to an expert and back
    dispatch: float
    combine: float
    # efficiency, fitted_to: fraction of the peak that matmuls reach, and the measurement it was fitted to
    efficiency: float
    fitted_to: str
    gradients: float = 4.0  # bytes per number of the summed gradients
    alike: bool = False  # whether the gradients of one micro-batch have the dtype of the weights
    in_codes: float = 0.0  # bytes per number of weights that a step gathers in codes; 0: none
    low_precision_copy: float = 0.0  # bytes per number of a second copy of the blocks' matrices
    fp8: bool = False  # whether the blocks' matmuls run in FP8; head, routers and attention never do
    muon: bool = False  # whether Muon updates the matrices, which then have one moment, not two
    sent_beside: int = 0  # bytes sent with a token for each chosen expert
    padding: float = 1.0  # size of the exchange buffers relative to a balanced load
    # whether a token crosses the network once per node, and spreads over the fast link there
    node_limited: bool = False
    backward_exchanges: int = 1  # exchanges of a layer's backward pass, relative to its forward pass

    def optimizer(self, role: str) -> float:
        """Returns the bytes per number of everything that an update reads and writes besides the gradient."""
        return MASTER + self.moments_of(role)

    def moments_of(self, role: str) -> float:
        """Returns the bytes per number of a weight's moments."""
        return self.moments / 2 if self.by_muon(role) else self.moments

    def by_muon(self, role: str) -> bool:
        """Returns whether Muon updates a weight."""
        return self.muon and role not in BY_ADAMW

    def read(self, role: str) -> float:
        """Returns the bytes per number of a weight as a step reads it."""
        return self.weights if role in MULTIPLIED else self.ends if role in CONVERTED else self.others

    @property
    def exchanged(self) -> float:
        """The bytes per number of the residual stream on its way to an expert and back."""
        return self.dispatch + self.combine


NAMES = ("run", "bf16", "v3")


def recipe(name: str, *, precision: str, moments_dtype: str, remat: str, method: str = "adamw") -> Recipe:
    """Returns the recipe called `name` for the config's settings (`method`: `config.optimizer`'s).

    Raises UserError for unknown names.
    """
    moments, width = 2.0 * jnp.dtype(moments_dtype).itemsize, float(jnp.dtype(policy(precision).compute).itemsize)
    bf16 = Recipe(
        weights=2.0,
        ends=2.0,
        others=2.0,
        moments=moments,
        activations=2.0,
        remat=remat,
        dispatch=2.0,
        combine=2.0,
        efficiency=0.375,
        fitted_to="V2's published GPU hours",
        muon=method == "muon",
        node_limited=True,
    )
    match name:
        case "run":
            return Recipe(
                weights=float(jnp.dtype(policy(precision).weights).itemsize),
                ends=width,
                others=MASTER,
                moments=moments,
                alike=True,
                activations=width,
                remat=remat,
                dispatch=SENT if precision in IN_CODES else width,
                combine=width,
                fp8=precision in IN_CODES,
                in_codes=CODED if precision == "fp8" else 0.0,
                muon=method == "muon",
                efficiency=0.22,
                fitted_to="our own step on one H200",
                sent_beside=INDEX,
                padding=HEADROOM[0],
                backward_exchanges=2,  # the forward exchange is repeated in the backward pass (`parallel.alltoall`)
            )
        case "bf16":
            return bf16
        case "v3":
            return replace(
                bf16,
                low_precision_copy=1.0,
                moments=2 * 2.0,
                remat=V3_POLICY,
                dispatch=FP8,
                fp8=True,
                efficiency=0.28,
                fitted_to="V3's published step on H800",
            )
    raise UserError(f"--recipe={name}: no such recipe. Choose one of {', '.join(NAMES)}.")

"""Operations per token: the one definition that the planner, the training log and the bench use.

    forward  = 2 * every number of every matrix that a token meets  +  flops_per_pair * layers * keys seen
    training = 3 * forward                                             (the backward pass costs twice the forward)

Keys seen: T where attention is counted in full (non-causal), T / 2 where only the past is (causal, the mean over the
sequence).  Of the routed experts a token meets top_k.  The embedding is a look-up and costs nothing.  What a policy
recomputes is no part of these numbers.

Multi-token prediction costs its own matrices, one more layer of attention and the head once more for each depth.
The published MFU of V3 (arXiv 2505.09343, table 4) counts neither it nor the routers; a training log counts both.
"""

from dataclasses import dataclass

from deepseek_jax.plan.network import AHEAD, HEAD, Network

TRAINING = 3  # forward and backward, in forward passes


@dataclass(frozen=True)
class Forward:
    """Operations of one token's forward pass, by part.

    Attributes:
        blocks: matrices of the main model's blocks, but for the routers.
        head: the output head.
        attention: queries with keys and values, all layers of the main model.
        router: scores of the experts.
        ahead: all of multi-token prediction but its routers.
        ahead_router: those.
    """

    blocks: float
    head: float
    attention: float
    router: float
    ahead: float
    ahead_router: float

    def total(self, *, router: bool, ahead: bool) -> float:
        """The sum, with or without the routers and multi-token prediction."""
        return (
            self.blocks
            + self.head
            + self.attention
            + router * self.router
            + ahead * (self.ahead + router * self.ahead_router)
        )


def keys_seen(seq_len: int, *, causal: bool) -> float:
    """Keys that a token meets, mean over a sequence of `seq_len`."""
    return seq_len / 2 if causal else seq_len


def forward(network: Network, seq_len: int, *, causal: bool) -> Forward:
    """The forward pass of one token of a sequence of `seq_len`."""

    def matrices(*parts: str, router: bool) -> int:
        return sum(2 * network.active(w) for w in network.of(*parts) if w.is_matrix and w.is_router == router)

    pairs = network.flops_per_pair * keys_seen(seq_len, causal=causal)
    head = matrices(HEAD, router=False)
    return Forward(
        blocks=matrices(*network.stacks, router=False),
        head=head,
        attention=pairs * network.n_layers,
        router=matrices(*network.stacks, router=True),
        ahead=matrices(AHEAD, router=False) + network.n_ahead * (pairs + head),
        ahead_router=matrices(AHEAD, router=True),
    )


def training(network: Network, seq_len: int, *, causal: bool = True, router: bool = True, ahead: bool = True) -> float:
    """Operations to train on one token; by default all that is done, attention counted causally."""
    return TRAINING * forward(network, seq_len, causal=causal).total(router=router, ahead=ahead)

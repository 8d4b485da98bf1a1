"""Operations per token: the one definition that the planner, the training log and the bench use.

    forward  = 2 * active parameters in matrices  +  flops_per_pair * layers * keys seen
    training = 3 * forward                           (the backward pass costs twice the forward pass)
    a new token = the same with flops_per_slot * the tokens in the cache

With an indexer a token sees most_keys keys at most, and flops_per_index * all keys are added, by which it chooses. An
indexer that rests (`Execution.index_rests`) costs nothing.
Where a key stands for several tokens (V4), there are fewer, and the window's tokens besides.

Keys seen: T if attention is counted in full (non-causal), T / 2 if only earlier tokens count (causal, the mean over
the sequence). Of the routed experts top_k are active per token. The embedding is a look-up and costs nothing. These
numbers do not include what a policy recomputes.

Multi-token prediction costs its own matrices, one more layer of attention per depth and the head once more per depth.
The published MFU of V3 (arXiv 2505.09343, table 4) counts neither multi-token prediction nor the routers; the training
log counts both.
"""

from dataclasses import dataclass

from deepseek_jax.plan.network import HEAD, INDEXER, MTP, Network, Reading

TRAINING = 3  # forward and backward, in forward passes
PUBLISHED_MFU = {"router": False, "mtp": False}  # parts that the published operations leave out


@dataclass(frozen=True)
class Forward:
    """Operations of the forward pass per token, by part."""

    blocks: float  # matrices of the main model's blocks, without the routers
    head: float
    attention: float  # queries with keys and values, in all layers of the main model
    router: float  # scores of the experts, in the main model
    mtp: float  # multi-token prediction without its routers
    mtp_router: float  # routers of multi-token prediction

    def total(self, *, router: bool, mtp: bool) -> float:
        """Returns the sum, with or without the routers and multi-token prediction."""
        main = self.blocks + self.head + self.attention + router * self.router
        return main + mtp * (self.mtp + router * self.mtp_router)


def keys_seen(seq_len: float, *, causal: bool) -> float:
    """Returns the number of keys that a token attends to, averaged over a sequence of `seq_len`."""
    return seq_len / 2 if causal else seq_len


def pair_flops(network: Network, seq_len: int, *, causal: bool) -> float:
    """Returns the operations per token and layer of attention, and of an indexer, over a sequence of `seq_len`.

    It is the mean over layers of different kinds.
    """
    return attention_flops(network, seq_len, causal=causal) / network.n_layers


def attention_flops(network: Network, seq_len: int, *, causal: bool) -> float:
    """Returns the operations per token of attention, and of indexers, in all layers of the main model."""
    return sum(n * reading_flops(reading, seq_len, causal=causal) for reading, n in network.layers.items())


def reading_flops(reading: Reading, seq_len: int, *, causal: bool) -> float:
    """Returns the operations per token of one layer's attention and indexer over a sequence of `seq_len`."""

    def seen(n_keys: float, most: int | None) -> float:
        keys = keys_seen(n_keys, causal=causal)
        if most is None or most >= n_keys:
            return keys
        return keys - ((n_keys - most) ** 2 / (2 * n_keys) if causal else n_keys - most)

    n_keys = seq_len / reading.tokens_per_key
    attended = seen(n_keys, reading.most_keys) + seen(seq_len, reading.window)
    return reading.flops_per_pair * attended + reading.flops_per_index * seen(n_keys, None)


def next_token(network: Network, n_before: int, *, dense: bool = False) -> float:
    """Returns the operations of one new token with `n_before` tokens in the cache.

    With `dense` it attends to all of them, a key each, and there is no indexer.
    """
    weights = [w for w in network.of(*network.stacks, HEAD) if w.is_matrix and not (dense and INDEXER in w.name)]

    def pairs(reading: Reading) -> float:
        if dense:
            return reading.flops_per_slot * n_before
        n_keys = n_before / reading.tokens_per_key
        most = n_keys if reading.most_keys is None else min(n_keys, reading.most_keys)
        return reading.flops_per_slot * (most + min(n_before, reading.window)) + reading.flops_per_index * n_keys

    return sum(2 * network.active(w) for w in weights) + sum(n * pairs(one) for one, n in network.layers.items())


def forward(network: Network, seq_len: int, *, causal: bool) -> Forward:
    """Returns the operations per token of the forward pass over a sequence of `seq_len`."""

    def matrices(*parts: str, router: bool) -> int:
        return sum(2 * network.active(w) for w in network.of(*parts) if w.is_matrix and (w.role == "router") == router)

    ahead = reading_flops(network.mtp_reading, seq_len, causal=causal)
    head = matrices(HEAD, router=False)
    return Forward(
        blocks=matrices(*network.stacks, router=False),
        head=head,
        attention=attention_flops(network, seq_len, causal=causal),
        router=matrices(*network.stacks, router=True),
        mtp=matrices(MTP, router=False) + network.mtp_depth * (ahead + head),
        mtp_router=matrices(MTP, router=True),
    )


def training(network: Network, seq_len: int, *, causal: bool = True, router: bool = True, mtp: bool = True) -> float:
    """Returns the training operations per token; by default everything, with attention counted causally."""
    return TRAINING * forward(network, seq_len, causal=causal).total(router=router, mtp=mtp)

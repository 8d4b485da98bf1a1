"""Numbers of parameters: in total, and active per token.

The "activated" numbers published for V2 and V3 leave out the embedding (a table from which one row is read) and count
the head: V3's 37.55 B are 36.63 B in that convention. DeepSeekMoE's 2.8 B count both. Multi-token prediction and the
routers' biases are counted separately.
"""

from dataclasses import dataclass

from deepseek_jax.plan.network import EMBEDDING, HEAD, MTP, Network


@dataclass(frozen=True)
class Counts:
    """Parameters of a network."""

    # total, active: of the main model, embedding and head included
    total: int
    active: int
    # embedding, head: those two tables alone
    embedding: int
    head: int
    experts: int  # routed experts
    # mtp_total, mtp_active: of multi-token prediction, without the embedding and the head that it shares
    mtp_total: int
    mtp_active: int
    router_biases: int  # the routers' balancing biases, which no gradient trains

    @property
    def active_without_embedding(self) -> int:
        """Returns the active parameters in the convention of V2 and V3: with the head, without the embedding."""
        return self.active - self.embedding


def count(network: Network) -> Counts:
    """Returns the counts of a network, from its shapes."""
    mtp = network.of(MTP)
    main = [w for w in network.weights if w.part != MTP]
    return Counts(
        total=sum(w.size for w in main),
        active=sum(map(network.active, main)),
        embedding=sum(w.size for w in network.of(EMBEDDING)),
        head=sum(w.size for w in network.of(HEAD)),
        experts=sum(w.size for w in main if w.is_expert),
        mtp_total=sum(w.size for w in mtp),
        mtp_active=sum(map(network.active, mtp)),
        router_biases=network.router_biases,
    )

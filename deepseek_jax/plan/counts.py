"""How many parameters there are, and how many work on a token.

The "activated" numbers published of V2 and V3 leave the embedding out (a table, from which one row is read) and count
the head: V3's 37.55 B are 36.63 B in that convention.  DeepSeekMoE's 2.8 B count both.  Multi-token prediction and the
routers' biases are counted apart.
"""

from dataclasses import dataclass

from deepseek_jax.plan.network import AHEAD, EMBEDDING, HEAD, Network


@dataclass(frozen=True)
class Counts:
    """Parameters of a network.

    Attributes:
        total, active: of the main model, embedding and head included.
        embedding, head: those two tables.
        experts: of the routed experts.
        ahead_total, ahead_active: of multi-token prediction, without the embedding and the head that it shares.
        router_biases: the routers' balancing biases, trained by no gradient.
    """

    total: int
    active: int
    embedding: int
    head: int
    experts: int
    ahead_total: int
    ahead_active: int
    router_biases: int

    @property
    def active_without_embedding(self) -> int:
        """The convention of V2 and V3: the head counts, the embedding does not."""
        return self.active - self.embedding


def count(network: Network) -> Counts:
    """The counts of a network, from its shapes."""
    ahead = network.of(AHEAD)
    main = [w for w in network.weights if w.part != AHEAD]
    return Counts(
        total=sum(w.size for w in main),
        active=sum(map(network.active, main)),
        embedding=sum(w.size for w in network.of(EMBEDDING)),
        head=sum(w.size for w in network.of(HEAD)),
        experts=sum(w.size for w in main if w.is_expert),
        ahead_total=sum(w.size for w in ahead),
        ahead_active=sum(map(network.active, ahead)),
        router_biases=network.router_biases,
    )

"""How devices, sequences and layers are divided: the mesh, the micro-batches, the pipeline's stages.

The mesh is pipe x data x expert, expert innermost.  A step's sequences are shared out over data and expert; each share
goes through the pipeline in micro-batches.  Consecutive layers make a stage; the embedding goes with the first stage,
final norm, head and multi-token prediction with the last.  Layers need not divide (V3: 61 over 16): each goes to the
device that has least to do, and no layer is split.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from deepseek_jax.errors import UserError
from deepseek_jax.plan.flops import keys_seen
from deepseek_jax.plan.network import AHEAD, EMBEDDING, HEAD, Network, Weight


@dataclass(frozen=True)
class Layout:
    """Sizes of a step.

    Attributes:
        pipe, data, expert: devices along each axis.
        batch: sequences of a step, over all devices.
        micro_batches: parts into which each pipeline cuts its sequences.
        seq_len: tokens of a sequence.
    """

    pipe: int
    data: int
    expert: int
    batch: int
    micro_batches: int
    seq_len: int

    @property
    def devices(self) -> int:
        """All of them."""
        return self.pipe * self.data * self.expert

    @property
    def sequences(self) -> int:
        """Sequences of one micro-batch on one device."""
        return self.batch // (self.data * self.expert * self.micro_batches)

    @property
    def tokens(self) -> int:
        """Tokens of those."""
        return self.sequences * self.seq_len

    @property
    def tokens_per_step(self) -> int:
        """Tokens of a step, over all devices."""
        return self.batch * self.seq_len


def make_layout(
    *, pipe: int, data: int, expert: int, devices: int, batch: int, micro_batches: int, seq_len: int
) -> Layout:
    """The layout of a mesh and a batch.

    Args:
        pipe, data, expert: mesh sizes; data -1 takes what is left.
        devices: how many there are; 0: as many as the mesh says, data -1 then counts as 1.
        batch: sequences of a step.
        micro_batches: 1 means, in a pipeline, as many as there are sequences.
        seq_len: tokens of a sequence.

    Raises:
        UserError: something does not divide.
    """
    given = f"config.mesh: pipe={pipe} x data={data} x expert={expert}"
    if min(pipe, expert) < 1 or (data < 1 and data != -1) or devices < 0:
        raise UserError(f"{given}, --devices={devices}: sizes are 1 or more (data may be -1: all the rest).")
    if data == -1:
        data = max(devices // (pipe * expert), 1)
    if devices and pipe * data * expert != devices:
        divisor = pipe * expert * (data if "data=-1" not in given else 1)
        raise UserError(
            f"{given} does not divide {devices} devices. Choose a multiple of {divisor} in --devices, or other sizes."
        )
    replicas = data * expert
    if batch % replicas:
        raise UserError(
            f"config.train.batch_size={batch} does not divide over data {data} x expert {expert} = {replicas} devices. "
            f"Choose a multiple of {replicas}."
        )
    share = batch // replicas
    micro_batches = share if pipe > 1 and micro_batches == 1 else micro_batches
    if micro_batches < 1 or share % micro_batches:
        raise UserError(
            f"config.train.micro_batches={micro_batches}: each of the {replicas} shares has {share} sequences. "
            f"Choose a divisor of {share}."
        )
    return Layout(pipe, data, expert, batch, micro_batches, seq_len)


@dataclass(frozen=True)
class Stage:
    """A part of the layers.

    Attributes:
        weights: those of its layers, and of embedding, head and multi-token prediction if it has them.
        layers: layers of each stack, (name, number).
        n_ahead: depths of multi-token prediction.
        has_embedding, has_head: whether tokens come in here, and whether the loss is computed here.
    """

    weights: tuple[Weight, ...]
    layers: tuple[tuple[str, int], ...]
    n_ahead: int
    has_embedding: bool
    has_head: bool

    @property
    def n_layers(self) -> int:
        """Layers of the main model."""
        return sum(n for _, n in self.layers)

    @property
    def n_attentions(self) -> int:
        """Attentions that a token passes."""
        return self.n_layers + self.n_ahead

    def n_expert_layers(self, network: Network) -> int:
        """Mixtures of experts that a token passes."""
        with_experts = {w.part for w in network.blocks() if w.is_expert}
        return sum(n for name, n in self.layers if name in with_experts) + (self.n_ahead if with_experts else 0)


def make_stages(
    network: Network, n_stages: int, seq_len: int, *, folded: bool = False, slow: float = 1.0
) -> tuple[Stage, ...]:
    """The stages of a pipeline.

    Args:
        network: what is divided.
        n_stages: 1 or more.
        seq_len: tokens of a sequence (attention's share of the operations grows with it).
        folded: whether stage s and the s-th from the end are on one device.  Elsewhere multi-token prediction, on the
            last stage, needs an embedding of its own.
        slow: how much longer an operation of head or attention takes than one of the blocks' matrices.

    Raises:
        UserError: more stages than layers.
    """
    if n_stages > network.n_layers:
        raise UserError(
            f"{n_stages} pipeline stages for {network.n_layers} layers: no layer can be split. "
            "Choose a smaller config.mesh.pipe (with --schedule=dualpipev it makes two stages each)."
        )
    order = [name for name in network.stacks for n in {w.n_layers for w in network.of(name)} for _ in range(n)]
    ends = network.of(*{w.part for w in network.weights} - {*network.stacks, EMBEDDING})
    stages, start = [], 0
    for number, n in enumerate(divide(network.n_layers, n_stages, _end_in_layers(network, seq_len, slow), folded)):
        mine, first, last = order[start : start + n], number == 0, number == n_stages - 1
        start += n
        layers = tuple((name, mine.count(name)) for name in network.stacks if name in mine)
        weights = [w.of_layers(k) for name, k in layers for w in network.of(name)]
        if first or (last and network.n_ahead and not folded):
            weights += network.of(EMBEDDING)
        weights += ends if last else ()
        stages.append(Stage(tuple(weights), layers, network.n_ahead if last else 0, first, last))
    return tuple(stages)


def divide(n_layers: int, n_stages: int, end: float, folded: bool) -> tuple[int, ...]:
    """How many layers each stage gets: one at a time, to the device that has least to do, the first of equals.

    The last stage does as much as `end` layers besides, and may do with none; any other gets one or more.  On a device
    with two stages (`folded`) they share its layers evenly, and what is odd, or would join the end, goes to the first.
    """
    device = [min(s, n_stages - 1 - s) if folded else s for s in range(n_stages)]
    least = [1] * (n_stages - 1) + [0 if n_stages > 1 else 1]
    load = [sum(n for n, d in zip(least, device, strict=True) if d == mine) for mine in range(max(device) + 1)]
    layers = list(load)
    load[device[-1]] += end
    for _ in range(n_layers - sum(layers)):
        idle = load.index(min(load))
        load[idle] += 1
        layers[idle] += 1
    if not folded:
        return tuple(layers)
    second = [0 if d == device[-1] and n_stages > 1 else layers[d] // 2 for d in range(len(layers))]
    if n_stages % 2:  # the stage in the middle is alone on its device
        second[-1] = 0
    first = [n - m for n, m in zip(layers, second, strict=True)]
    return (*first, *reversed(second[: n_stages - len(first)]))


def _end_in_layers(network: Network, seq_len: int, slow: float) -> float:
    """Operations of the head and of multi-token prediction, in those of a layer."""
    pairs = slow * network.flops_per_pair * keys_seen(seq_len, causal=True)

    def cost(*parts: str) -> float:
        return sum(2 * network.active(w) * (slow if w.part == HEAD else 1) for w in network.of(*parts) if w.is_matrix)

    layer = cost(*network.stacks) / network.n_layers + pairs
    return ((1 + network.n_ahead) * cost(HEAD) + cost(AHEAD) + network.n_ahead * pairs) / layer


def describe_layers(stages: Sequence[Stage]) -> str:
    """The layers of the stages in order, equal neighbours together: "15 x 4, 1"."""
    runs: list[list[int]] = []
    for stage in stages:
        if runs and runs[-1][1] == stage.n_layers:
            runs[-1][0] += 1
        else:
            runs.append([1, stage.n_layers])
    return ", ".join(f"{k} x {n}" if k > 1 else f"{n}" for k, n in runs)

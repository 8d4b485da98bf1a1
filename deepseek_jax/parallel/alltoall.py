"""Expert parallelism: send each token to the devices that hold its experts, and bring the results back.

    one hop     to each device that holds any of its experts, once
    two hops    devices are divided into groups, such as the nodes of a cluster: once to each group that holds any,
                there to the device with the same place in its group; from that one to the devices of the group.
                Results are summed in the group before they go back.

Nothing is dropped. Devices exchange buffers of equal size, and what arrives is packed: experts compute few empty rows.
There are three levels of sizes (`HEADROOM`), of which the last holds any load. All devices agree on the lowest that is
enough for this exchange, so that the padding follows the load. In a pipeline the level is given (`Exchange.level`), for
an op cannot choose it: whether it was enough is reported (`Sent`), and `train.attempts` runs a step again if not.

Tokens travel in one of two kinds of exchange (`KINDS`): `padded`, XLA's all_to_all of whole buffers, or `ragged`, its
ragged_all_to_all, which sends only the rows that are filled. That took 20 times as long on four H200, and CPUs do not
have it. The few numbers that say where tokens go always travel padded.

Paper: V3 section 3.2.2 describes the same exchange with NVSHMEM kernels, in two hops for routing that is limited to
some nodes (section 2.1.2).
"""

import functools
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import AnyMesh
from deepseek_jax.parallel.sharding import expert_axis
from deepseek_jax.precision.wire import AS_IS, Wire, carried

KINDS = ("padded", "ragged")
HEADROOM = (1.25, 2.0, math.inf)  # sizes of the buffers, in multiples of what perfect balance needs; inf: any load

# compute(x_AD, experts_AK, weights_AK, n_rows) -> y_AD of this device's experts, where index `n_local` means none; at
# most `n_rows` pairs of a token and an expert are not none
Compute = Callable[[jax.Array, jax.Array, jax.Array, int | None], jax.Array]


class Sizes(NamedTuple):
    """Rows of the buffers of an exchange; static."""

    buffers: tuple[int, ...]  # of each hop, for each destination
    computed: int  # pairs of a token and an expert that a device computes


class Sent(NamedTuple):
    """What exchanges report, as sums over layers, micro-batches and devices; float32."""

    # within, across: bytes that a device sends to others in the forward pass: in its group, and to other groups
    within: jax.Array
    across: jax.Array
    too_small: jax.Array  # how often each of `HEADROOM` but the last was too small


def nothing_sent() -> Sent:
    """What is reported where nothing is exchanged."""
    return Sent(jnp.float32(0), jnp.float32(0), jnp.zeros((len(HEADROOM) - 1,), jnp.float32))


def added(parts: Sequence[Sent]) -> Sent:
    """The sums of what several exchanges report."""
    return functools.reduce(lambda a, b: jax.tree.map(jnp.add, a, b), parts, nothing_sent())


class Hop(NamedTuple):
    """Devices of a mesh axis that exchange buffers: `n`, each `stride` places after the one before."""

    axis: str
    n: int
    stride: int
    n_held: int  # experts behind each of them

    def send(self, rows_AD: jax.Array) -> jax.Array:
        """The rows that the n devices have for this one, from n parts of equal size; its own transpose."""
        return jax.lax.all_to_all(rows_AD, self.axis, 0, 0, axis_index_groups=self.peers(), tiled=True)

    def place(self) -> jax.Array:
        """Which of the n devices this one is."""
        return jax.lax.axis_index(self.axis) // self.stride % self.n

    def peers(self) -> list[list[int]] | None:
        """The devices that exchange with one another, by their places along the axis; None: all."""
        n_devices, block = jax.lax.axis_size(self.axis), self.stride * self.n
        if block == n_devices and self.stride == 1:
            return None
        firsts = (start + i for start in range(0, n_devices, block) for i in range(self.stride))
        return [list(range(first, first + block, self.stride)) for first in firsts]


@functools.partial(jax.tree_util.register_dataclass, data_fields=("sent_W", "received_W"), meta_fields=("hop",))
@dataclass(frozen=True)
class Ragged:
    """Moves the filled rows of a hop's buffers, which are the first of each part (`precision.wire.Carry`)."""

    hop: Hop
    sent_W: jax.Array  # how many this device has for each of the n, int32
    received_W: jax.Array  # how many each of them has for this one

    def __call__(self, rows_AD: jax.Array) -> jax.Array:
        """See `Hop.send`; rows that are not filled are 0."""
        n, axis = self.hop.n, self.hop.axis
        begin_W = jnp.arange(n, dtype=jnp.int32) * (len(rows_AD) // n)
        there_W = jnp.full((n,), self.hop.place() * (len(rows_AD) // n), jnp.int32)
        sizes = begin_W, self.sent_W, there_W, self.received_W
        empty_AD = jnp.zeros_like(rows_AD)
        return jax.lax.ragged_all_to_all(rows_AD, empty_AD, *sizes, axis_name=axis, axis_index_groups=self.hop.peers())

    @property
    def back(self) -> "Ragged":
        """The way back of the same rows."""
        return Ragged(self.hop, self.received_W, self.sent_W)


@functools.partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("hop",))
@dataclass(frozen=True)
class Padded:
    """Moves a hop's whole buffers (`precision.wire.Carry`)."""

    hop: Hop

    def __call__(self, rows_AD: jax.Array) -> jax.Array:
        """See `Hop.send`."""
        return self.hop.send(rows_AD)

    @property
    def back(self) -> "Padded":
        """Itself."""
        return self


@jax.tree_util.register_static
@dataclass(frozen=True)
class Stay:
    """Moves nothing (`precision.wire.Carry`)."""

    def __call__(self, rows_AD: jax.Array) -> jax.Array:
        """Returns the rows."""
        return rows_AD

    @property
    def back(self) -> "Stay":
        """Itself."""
        return self


@dataclass(frozen=True)
class Exchange:
    """How tokens reach the devices of their experts; static."""

    axis: str  # mesh axis over which the routed experts are split
    n_devices: int  # along it
    groups: int = 1  # of consecutive devices, to each of which a token goes once; 1: one hop
    level: int | None = None  # index of `HEADROOM`; None: what is enough, found out in each exchange
    kind: str = "padded"  # one of `KINDS`

    def hops(self, n_local: int) -> tuple[Hop, ...]:
        """The hops on the way to the experts, `n_local` of which each device holds."""
        if self.groups in (1, self.n_devices):
            return (Hop(self.axis, self.n_devices, 1, n_local),)
        members = self.n_devices // self.groups
        return Hop(self.axis, self.groups, members, members * n_local), Hop(self.axis, members, 1, n_local)

    def plan(self, n_tokens: int, top_k: int, n_local: int, limit: tuple[int, int] = (1, 1)) -> "Plan":
        """The plan for the tokens of a device.

        A token's experts lie in at most `limit[0]` of the `limit[1]` groups into which a router divides all experts.
        """
        hops = self.hops(n_local)
        sizes = [_sizes(hops, headroom, n_tokens, top_k, limit) for headroom in HEADROOM]
        most = itertools.accumulate((size.computed for size in sizes), max)
        return Plan(
            hops, tuple(Sizes(size.buffers, n) for size, n in zip(sizes, most, strict=True)), self.level, self.kind
        )


class Plan(NamedTuple):
    """An exchange of so many tokens; static."""

    hops: tuple[Hop, ...]
    sizes: tuple[Sizes, ...]  # for each of `HEADROOM`
    # level, kind: as in `Exchange`
    level: int | None
    kind: str

    @property
    def given(self) -> Sizes | None:
        """The sizes that are used in any case; None: as many as are needed."""
        if self.level is None:
            return self.sizes[-1] if len({*self.sizes}) == 1 else None
        return self.sizes[self.level]

    def report(self, x_MD: jax.Array, experts_MK: jax.Array, weights_MK: jax.Array, wire: Wire) -> Sent:
        """What the exchange of these tokens reports; the same on all devices of the axis."""
        counts = count(experts_MK, self.hops)
        is_too_small = too_small(counts, self.sizes)
        level = first_enough(is_too_small) if self.level is None else self.level
        beside, rows = _row_bytes(x_MD, weights_MK, wire)
        moved = jnp.asarray([self._moved(each) for each in self.sizes], jnp.float32)[level]
        filled = jnp.stack(counts.moved(self.hops)).astype(jnp.float32) if self.kind == "ragged" else moved
        within, across = moved * beside + filled * rows
        return Sent(within, across, is_too_small.astype(jnp.float32))

    def _moved(self, sizes: Sizes) -> tuple[int, int]:
        """Rows that a device sends to others of its group, and to other groups."""
        *before, last = ((hop.n - 1) * rows for hop, rows in zip(self.hops, sizes.buffers, strict=True))
        return last, sum(before)


def copies(reached: int, top_k: int, limit: tuple[int, int]) -> int:
    """Returns to how many of `reached` devices, or groups of them, a token goes at most; `limit` as in `Exchange.plan`.

    A group of the router's is on several of them, or several of its groups are on one.
    """
    top_groups, n_groups = limit
    return min(top_k, reached, top_groups * max(math.ceil(reached / n_groups), 1))


def _sizes(hops: tuple[Hop, ...], headroom: float, n_tokens: int, top_k: int, limit: tuple[int, int]) -> Sizes:
    buffers, n_rows, reached, sources = [], n_tokens, 1, 1
    for hop in hops:
        reached *= hop.n  # groups, then devices
        buffers.append(_padded(headroom, n_tokens * copies(reached, top_k, limit) * sources / reached, n_rows))
        n_rows, sources = buffers[-1] * hop.n, sources * hop.n
    most = n_rows * min(top_k, hops[-1].n_held)
    packed = _padded(headroom, n_tokens * top_k, most)
    return Sizes(tuple(buffers), packed if 2 * packed <= most else most)


def _padded(headroom: float, balanced: float, most: int) -> int:
    return most if headroom * balanced >= most else min(int(math.ceil(balanced) * headroom), most)


def make_exchange(rules: Mapping[str, str], mesh: AnyMesh, groups: int = 1, kind: str = "padded") -> Exchange | None:
    """The exchange of a run, None where all experts are on every device.

    `rules` maps logical axes to mesh axes, and `groups` and `kind` are those of `Exchange`. Raises UserError if
    `groups` does not divide the devices.
    """
    axis = expert_axis(rules, mesh)
    n_devices = mesh.shape[axis] if axis else 1
    if n_devices % groups:
        raise UserError(
            f"config.exchange.groups={groups}: the routed experts are split over {n_devices} devices (config.mesh, "
            "config.sharding.experts). Choose a divisor of that number, or 1 for an exchange without groups."
        )
    return Exchange(axis, n_devices, groups, kind=kind) if axis else None


class Buffers(NamedTuple):
    """Which token stands in which row of the buffers that this device sends, W destinations x `capacity` rows."""

    token_A: jax.Array  # token of each row; M (one past the last) where the row is empty
    row_MW: jax.Array  # row of each token's copy for each destination; W * capacity where the token does not go there


def fill_buffers(goes_MW: jax.Array, capacity: int) -> Buffers:
    """Assigns buffer rows to the tokens that go to each destination (`goes_MW`, bool), in the tokens' order.

    A token that finds its buffer full goes nowhere.
    """
    n_tokens, n_there = goes_MW.shape
    place_MW = jnp.cumsum(goes_MW, axis=0, dtype=jnp.int32) - 1
    goes_MW &= place_MW < capacity
    row_MW = jnp.where(goes_MW, jnp.arange(n_there, dtype=jnp.int32) * capacity + place_MW, n_there * capacity)
    tokens_MW = jnp.broadcast_to(jnp.arange(n_tokens, dtype=jnp.int32)[:, None], row_MW.shape)
    token_A = jnp.full((n_there * capacity,), n_tokens, jnp.int32).at[row_MW].set(tokens_MW, mode="drop")
    return Buffers(token_A, row_MW)


class Arrived(NamedTuple):
    """The tokens that have come to the experts of this device, and the way back."""

    x_AD: jax.Array  # the tokens; empty rows are 0
    # experts_AK, weights_AK: their experts here, as indices of this device (`n_local` means none), and factors
    experts_AK: jax.Array
    weights_AK: jax.Array
    # of each hop: rows of each token that was sent, in what comes back, in the order of destinations; what moved them
    rows: tuple[jax.Array, ...] = ()
    moves: tuple[Padded | Ragged, ...] = ()


def dispatch(
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    *,
    plan: Plan,
    sizes: Sizes,
    wire: Wire = AS_IS,
) -> Arrived:
    """Sends each token to the devices of its experts: the first half of the exchange, in buffers of these sizes.

    `experts_MK` are indices of all experts. Tokens travel in the format of `wire`, and their gradients come back as
    they are.
    """
    arrived = Arrived(x_MD, experts_MK, weights_MK)
    for hop, capacity in zip(plan.hops, sizes.buffers, strict=True):
        arrived = _sent_on(arrived, hop, capacity, wire, plan.kind)
    return arrived


def _sent_on(here: Arrived, hop: Hop, capacity: int, wire: Wire, kind: str) -> Arrived:
    """What arrives when all devices of a hop have sent what they hold to those that need it."""
    x_MD, experts_MK, weights_MK, rows, moves = here
    token_A, row_MW = fill_buffers(_destinations(experts_MK, hop).any(axis=1), capacity)

    def buffered(of_tokens: jax.Array, empty: float) -> jax.Array:
        return jnp.take(of_tokens, token_A, axis=0, mode="fill", fill_value=empty)

    # Each device turns the indices that reach it into its own; what belongs to others becomes "none".
    theirs_AK = hop.send(buffered(experts_MK, hop.n_held * hop.n)) - hop.place() * hop.n_held
    local_AK = jnp.where((theirs_AK >= 0) & (theirs_AK < hop.n_held), theirs_AK, hop.n_held)
    # At most `n_held` of a token's K experts are here: keep those places and drop the others.
    places_AK = jnp.argsort(local_AK, axis=1)[:, : hop.n_held]
    theirs_AK = hop.send(buffered(weights_MK, 0))
    local_AK, weights_AK = (jnp.take_along_axis(part, places_AK, axis=1) for part in (local_AK, theirs_AK))
    row_MK = jnp.sort(row_MW, axis=1)[:, : experts_MK.shape[1]]  # a token goes to no more places than it has experts
    move: Padded | Ragged = Padded(hop)
    if kind == "ragged":
        sent_W = jnp.sum(row_MW < hop.n * capacity, axis=0, dtype=jnp.int32)
        move = Ragged(hop, sent_W, hop.send(sent_W))
    x_AD = carried(buffered(x_MD, 0), wire, AS_IS, move)
    return Arrived(x_AD, local_AK, weights_AK, (*rows, row_MK), (*moves, move))


def combine(y_AD: jax.Array, arrived: Arrived, *, wire: Wire = AS_IS) -> jax.Array:
    """Sends the results back and sums those of each token, y_MD: the second half of the exchange.

    Results travel as they are, their gradients in the format of `wire`.
    """
    for move, row_MK in zip(reversed(arrived.moves), reversed(arrived.rows), strict=True):
        back_AD = carried(y_AD, AS_IS, wire, move.back)
        y_AD = jnp.sum(jnp.take(back_AD, row_MK, axis=0, mode="fill", fill_value=0), axis=1)
    return y_AD


class Counts(NamedTuple):
    """How many rows go where in an exchange; int32, the same on all devices of the axis."""

    goes_WG: jax.Array  # tokens of each device that go to each group
    through_WW: jax.Array  # rows for each device, by the place in their groups of the devices that they come through
    pairs_W: jax.Array  # pairs of a token and an expert that each device computes

    def moved(self, hops: tuple[Hop, ...]) -> tuple[jax.Array, jax.Array]:
        """Rows that this device sends to others of its group, and to other groups."""
        last, me = hops[-1], jax.lax.axis_index(hops[-1].axis)
        group, place = me // last.n, me % last.n
        near_W = jax.lax.dynamic_slice_in_dim(self.through_WW[place], group * last.n, last.n)
        across = jnp.sum(self.goes_WG[me]) - self.goes_WG[me, group] if len(hops) > 1 else jnp.zeros((), jnp.int32)
        return jnp.sum(near_W) - near_W[place], across


def count(experts_MK: jax.Array, hops: tuple[Hop, ...]) -> Counts:
    """The counts of the exchange of these tokens."""
    last, axis = hops[-1], hops[0].axis
    n_devices = jax.lax.axis_size(axis)
    pairs_MW = _destinations(experts_MK, Hop(axis, n_devices, 1, last.n_held)).sum(axis=1, dtype=jnp.int32)
    goes_MG = (pairs_MW > 0).reshape(len(pairs_MW), -1, last.n).any(axis=-1)
    counts = [jnp.sum(part, axis=0, dtype=jnp.int32) for part in (pairs_MW, pairs_MW > 0, goes_MG)]
    gathered = jax.lax.all_gather(jnp.concatenate(counts), axis)  # first axis: who sends
    pairs_WW, goes_WW, goes_WG = jnp.split(gathered, [n_devices, 2 * n_devices], axis=1)
    return Counts(goes_WG, goes_WW.reshape(-1, last.n, n_devices).sum(axis=0), jnp.sum(pairs_WW, axis=0))


def too_small(counts: Counts, sizes: tuple[Sizes, ...]) -> jax.Array:
    """Which of the sizes but the last do not hold this exchange, bool; the same on all devices of the axis."""
    needed = [jnp.max(part) for part in counts]
    held = jnp.asarray([[*size.buffers, size.computed] for size in sizes[:-1]], jnp.int32)
    return jnp.any(jnp.stack(needed[-held.shape[1] :]) > held, axis=1)


def first_enough(is_too_small: jax.Array) -> jax.Array:
    """Index of the first of `HEADROOM` that is enough, from `too_small`."""
    return jnp.argmin(jnp.append(is_too_small, False))


def on_expert_devices(
    compute: Compute,
    x_MD: jax.Array,
    experts_MK: jax.Array,
    weights_MK: jax.Array,
    plan: Plan,
    sent: Sent,
    wire: Wire = AS_IS,
) -> jax.Array:
    """Weighted sum of each token's experts: `dispatch`, `compute`, `combine`, with the smallest sizes that are enough.

    `sent` is the plan's report of this exchange; other arguments as for `dispatch`.
    """
    sizes = list(dict.fromkeys(plan.sizes))

    def exchange(sizes: Sizes) -> Callable:
        def run(*of_tokens: jax.Array) -> jax.Array:
            arrived = dispatch(*of_tokens, plan=plan, sizes=sizes, wire=wire)
            return combine(compute(*arrived[:3], sizes.computed), arrived, wire=wire)

        return jax.checkpoint(run)  # else the backward pass would keep the buffers of every branch, taken or not

    choice = jnp.asarray([sizes.index(each) for each in plan.sizes])[first_enough(sent.too_small > 0)]
    return jax.lax.switch(choice, [exchange(each) for each in sizes], x_MD, experts_MK, weights_MK)


def on_this_device(
    compute: Compute, x_MD: jax.Array, experts_MK: jax.Array, weights_MK: jax.Array, *, wire: Wire = AS_IS
) -> jax.Array:
    """As `on_expert_devices` where all experts are here: nothing is sent, but rounded as if it were."""
    y_MD = compute(carried(x_MD, wire, AS_IS, Stay()), experts_MK, weights_MK, None)
    return carried(y_MD, AS_IS, wire, Stay())


def _row_bytes(x_MD: jax.Array, weights_MK: jax.Array, wire: Wire) -> tuple[int, int]:
    """Bytes that a row of the buffers takes: its experts and their factors, and the token itself, there and back."""
    back = jax.ShapeDtypeStruct((1, x_MD.shape[1]), x_MD.dtype)
    beside = weights_MK.shape[1] * (jnp.dtype(jnp.int32).itemsize + weights_MK.dtype.itemsize)
    return beside, sum(part.size * part.dtype.itemsize for part in (jax.eval_shape(wire.encode, back), back))


def _destinations(experts_MK: jax.Array, hop: Hop) -> jax.Array:
    """Which destination of a hop holds each expert of a token, bool [M, K, W]; none of them where it visits none."""
    return jax.nn.one_hot(experts_MK // hop.n_held, hop.n, dtype=jnp.bool_)

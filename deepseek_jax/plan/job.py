"""What is planned: a network on chips, divided in some way. Everything else in this package is a function of it."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import count
from math import ceil
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh

from deepseek_jax.chips import Chip
from deepseek_jax.layers.base import in_codes
from deepseek_jax.parallel.alltoall import Hop, copies, make_exchange
from deepseek_jax.parallel.homes import Homes, make_homes
from deepseek_jax.parallel.mesh import ALL, AnyMesh
from deepseek_jax.parallel.sharding import Placement, bytes_per_device, expert_axis, placements
from deepseek_jax.parallel.stages import StageShare
from deepseek_jax.plan.layout import Layout, Stage, make_stages
from deepseek_jax.plan.network import EMBEDDING, HEAD, Network, Weight
from deepseek_jax.plan.recipes import MASTER, Recipe
from deepseek_jax.plan.schedules import Schedule

ENDS = (EMBEDDING, HEAD)
BY_BYTES = {1: jnp.int8, 2: jnp.bfloat16, 4: jnp.float32}  # dtypes; FP8 in codes counts as one byte
Form = tuple[tuple[int, ...], np.dtype]  # shape and dtype of a leaf on a device


@dataclass(frozen=True)
class Part:
    """A stage's part of one weight, as one device holds it."""

    weight: Weight  # of the layers of this stage
    place: Placement  # on the mesh of the stage
    numbers: int  # how many of its numbers this device holds
    optimizer_numbers: int  # for how many of them this device holds the float32 weight and the optimizer state


class Holding(NamedTuple):
    """A part of a weight on a device along the pipeline."""

    part: Part
    is_copy: bool  # whether it belongs to the second copy of the model
    kept: float  # share of its optimizer state (and float32 weights) that is kept here: that of two copies is kept once


@dataclass(frozen=True)
class Job:
    """A network, how it is divided, and the chips on which it runs."""

    # network, layout, chip, schedule, recipe: see their modules
    network: Network
    layout: Layout
    chip: Chip
    schedule: Schedule
    recipe: Recipe
    rules: Mapping[str, str]  # logical axis -> mesh axis (`config.sharding`)
    groups: int = 1  # of expert devices, to each of which a token goes once (`config.exchange`)
    put_off: int = -1  # W that a rank puts off at most (`config.pipeline`)
    adapters: tuple[Weight, ...] = ()  # low-rank ones (`config.lora`), which alone are trained; (): all weights are
    adapted: int = 0  # numbers of the matrices that have one

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        """The stages of the pipeline. Raises UserError if there are more stages than layers."""
        slow = self.chip.fp8 / self.chip.bf16 if self.recipe.fp8 else 1.0
        arrangement = self.schedule.arrangement
        number, folded = arrangement.n_stages(self.layout.pipe), arrangement.stages_per_device > 1
        seq_len, has_head = self.layout.seq_len, not self.shares_vocabulary
        return make_stages(self.network, number, seq_len, folded=folded, slow=slow, has_head=has_head)

    @cached_property
    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """The weights of each stage on one of its devices. Raises UserError if a weight does not divide."""
        return tuple(self._placed(stage.weights, self.layout.mesh) for stage in self.stages)

    @cached_property
    def adapter_parts(self) -> tuple[Part, ...]:
        """The adapters on one of the devices."""
        return self._placed(self.adapters, self.layout.mesh)

    @property
    def n_adapter_numbers(self) -> int:
        """How many numbers are trained, where these are those of adapters."""
        return sum(weight.size for weight in self.adapters)

    @property
    def shares_vocabulary(self) -> bool:
        """Whether all ranks along the pipeline share embedding and head, as in a run of ours."""
        return self.recipe.alike and self.layout.pipe > 1

    def holdings(self, rank: int) -> list[Holding]:
        """Returns what the devices of a pipeline rank hold of each weight; in a run of ours all hold equally much."""
        if self.shares_vocabulary:
            return self.of_any_rank
        copies, holds = self.schedule.arrangement.copies, enumerate(self.ranks[rank])
        return [Holding(part, copies > 1 and k > 0, 1 / copies) for k, hold in holds for part in self.parts[hold.stage]]

    @cached_property
    def of_any_rank(self) -> list[Holding]:
        """What every device along the pipeline keeps between steps: of a stack, as many layers as the fullest stage.

        It does so for each of its stages, but once of a stack that none has in two. Embedding and head are divided over
        the ranks; final norm and multi-token prediction are on all of them.
        """
        arrangement, network, most = self.schedule.arrangement, self.network, self._most
        stacked = tuple(w.repeated(most[w.part]) for w in network.of(*network.stacks) if most[w.part])
        others = network.of(*{w.part for w in network.weights} - {*network.stacks})
        layout = self.layout
        mesh = AbstractMesh((layout.pipe, layout.data, layout.context, layout.expert), ALL)
        stages, parts = range(arrangement.stages_per_device), self._placed(stacked, layout.mesh)
        found = [(part, k) for k in stages for part in parts if part.weight.part not in self._shared]
        held = [Holding(part, arrangement.copies > 1 and k > 0, 1 / arrangement.copies) for part, k in found]
        once = [*(part for part in parts if part.weight.part in self._shared), *self._placed(others, mesh)]
        return [*held, *(Holding(part, is_copy=False, kept=1.0) for part in once)]

    @cached_property
    def homes(self) -> list[Holding]:
        """What the step of a run's pipeline reads on every device, as `parallel.homes` lays it out, but for its ends.

        What more arrays of a form there are than the stage with most needs, the second copy of the model is for.
        """
        leaves, most, laid = self.laid
        is_copied, found = self.schedule.arrangement.copies > 1, []
        for form, n in Counter((array.shape, array.dtype) for array in laid.forms).items():
            first, leaf = min(n, most[form]) if is_copied else n, leaves[form]
            pairs = ((first, False), (n - first, True))
            found += [Holding(replace(leaf, numbers=k * leaf.numbers), copy, 1.0) for k, copy in pairs if k]
        return found

    @cached_property
    def laid(self) -> tuple[dict[Form, Part], dict[Form, int], Homes]:
        """What a run's pipeline makes of the weights of its stages: (a leaf of each form, most in a stage, arrays)."""
        of_kinds = [self._leaves(self.stages[kind].weights) for kind in self._kinds]
        leaves = {form: leaf for found in of_kinds for form, (leaf, _) in found.items()}
        most = {form: max(found[form][1] for found in of_kinds if form in found) for form in leaves}
        every = [(form, k) for form, n in most.items() for k in range(n)]
        is_read = [[form in found and k < found[form][1] for form, k in every] for found in of_kinds]
        kinds = np.array([[self._kind(hold.stage) for hold in held] for held in self.ranks])
        return leaves, most, make_homes(kinds, [jax.ShapeDtypeStruct(*form) for form, _ in every], is_read)

    @cached_property
    def _kinds(self) -> list[int]:
        """The number of the first stage of each kind; a run has a program for each."""
        first: dict[tuple, int] = {}
        for number, stage in enumerate(self.stages):
            first.setdefault((stage.repeats, stage.has_head), number)
        return list(first.values())

    def _kind(self, number: int) -> int:
        mine = self.stages[number]
        kinds = [(self.stages[kind].repeats, self.stages[kind].has_head) for kind in self._kinds]
        return kinds.index((mine.repeats, mine.has_head))

    def put_together(self, number: int) -> float:
        """Returns the bytes of the largest leaf that a stage of a run's pipeline reads in pieces, and makes whole."""
        if not self.shares_vocabulary:
            return 0.0
        *_, laid = self.laid
        places = (of for (_, kind), of in laid.places.items() if kind == self._kind(number))
        leaves = [(laid.leaves[n], laid.forms[lie[0]]) for of in places for n, lie in of.items()]
        return max((float(a.size * a.dtype.itemsize) for a, array in leaves if a.shape != array.shape), default=0.0)

    def _leaves(self, weights: Sequence[Weight]) -> dict[Form, tuple[Part, int]]:
        """Returns, by shape and dtype on a device, (one leaf of weights of a stage, how many there are)."""
        found: dict[Form, tuple[Part, int]] = {}
        for part in self._placed([w for w in weights if w.part not in ENDS], self.layout.mesh):
            axes, sizes = dict(enumerate(part.place.spec)), self.layout.mesh.shape
            own = [n // sizes[axes[dim]] if axes.get(dim) else n for dim, n in enumerate(part.weight.shape)]
            is_layer = part.weight.part in self.network.stacks
            form = tuple(own[1 if is_layer else 0 :]), jnp.dtype(BY_BYTES[int(self.read(part))])
            n = part.weight.repeats if is_layer else 1
            leaf, known = found.get(form, (replace(part, numbers=part.numbers // n), 0))
            found[form] = leaf, known + n
        return found

    @property
    def ends(self) -> list[Holding]:
        """Embedding and head in a run's pipeline, each device's share."""
        return [holding for holding in self.of_any_rank if holding.part.weight.part in ENDS]

    @cached_property
    def _shared(self) -> set[str]:
        """The stacks of which no rank has layers in two of its stages, so that these share the memory for them."""

        def has(name: str, hold: StageShare) -> bool:
            return dict(self.stages[hold.stage].repeats).get(name, 0) > 0

        counts = {name: max(sum(has(name, hold) for hold in held) for held in self.ranks) for name in self._most}
        return {name for name, n in counts.items() if n <= 1}

    @cached_property
    def _most(self) -> dict[str, int]:
        """Repeats of each stack in the stage that has most of them."""
        return {name: max(dict(stage.repeats).get(name, 0) for stage in self.stages) for name in self.network.stacks}

    @property
    def router_biases(self) -> float:
        """How many router biases a device holds: all, or in a run's pipeline those of its layers."""
        network, arrangement = self.network, self.schedule.arrangement
        if not (self.shares_vocabulary and network.router_biases):
            return network.router_biases
        stored = arrangement.stages_per_device // arrangement.copies
        sets = {name: 1 if name in self._shared else stored for name in self._most}
        here = sum(sets[name] * n * network.expert_blocks(name) for name, n in self._most.items())
        layers = sum(n * network.expert_blocks(name) for name, n in network.repeats.items())
        return network.router_biases * (here + network.mtp_depth) / (layers + network.mtp_depth)

    @cached_property
    def ranks(self) -> tuple[tuple[StageShare, ...], ...]:
        """The stages that each device along the pipeline holds."""
        return tuple(self.schedule.arrangement.hold(rank, self.layout.pipe) for rank in range(self.layout.pipe))

    @property
    def expert_devices(self) -> int:
        """The number of devices over which the routed experts are divided."""
        axis = expert_axis(self.rules, self.layout.mesh) if self.network.n_experts > 1 else None
        return self.layout.mesh.shape[axis] if axis else 1

    @property
    def is_absorbed(self) -> bool:
        """Whether the queries of divided sequences meet what is gathered as it is, and no keys and values are made."""
        at = self.layout
        return at.context > 1 and all(reading.gathers(at.seq_len) for reading in self.network.layers)

    @property
    def gathered_bytes(self) -> float:
        """Of a token and layer, where sequences are divided: of what is gathered as it is."""
        narrow, wide = self.network.gathered
        return narrow * self.recipe.activations + wide * MASTER

    def held(self, part: Part) -> tuple[float, float]:
        """Returns the bytes of a weight as a step reads it, and of the float32 weight; the latter 0 if it is the same.

        What is stored in shards and gathered where it is used is float32 until there.
        """
        read = MASTER if part.place.is_sharded else self.read(part)
        is_master = part.place.zero_dim is None and read == MASTER
        return part.numbers * read, 0.0 if is_master else part.optimizer_numbers * MASTER

    def read(self, part: Part) -> float:
        """Returns the bytes per number of a weight as a step gathers it."""
        weight, recipe = part.weight, self.recipe
        is_coded = recipe.in_codes and in_codes(weight.axes, weight.shape, weight.role, part.place, self.layout.mesh)
        return recipe.in_codes if is_coded else recipe.read(weight.role)

    @property
    def backward_exchanges(self) -> int:
        """Exchanges of a layer's backward pass, relative to its forward pass; none is repeated where all is kept."""
        keeps_all = self.layout.pipe > 1 and self.recipe.remat == "none"
        return 1 if keeps_all else self.recipe.backward_exchanges

    @cached_property
    def hops(self) -> tuple[tuple[int, Hop], ...]:
        """The hops of a token on its way to experts: (copies of it that arrive, the devices that exchange).

        Raises UserError if the groups do not divide the devices.
        """
        exchange = make_exchange(self.rules, self.layout.mesh, self.groups)
        if self.expert_devices == 1 or exchange is None:
            return ()
        if self.recipe.node_limited:
            nodes = ceil(exchange.n_devices / min(exchange.n_devices, self.chip.reach))
            exchange = replace(exchange, groups=next(n for n in count(nodes) if exchange.n_devices % n == 0))
        limit, reached, found = (self.network.top_groups, self.network.n_groups), 1, []
        for hop in exchange.hops(1):
            reached *= hop.n
            found.append((copies(reached, self.network.top_k, limit), hop))
        return tuple(found)

    def passes(self, hold: StageShare) -> float:
        """Returns the micro-batches that pass a stage on this device per step."""
        return hold.share * self.layout.micro_batches

    def _placed(self, weights: Sequence[Weight], mesh: AnyMesh) -> tuple[Part, ...]:
        shapes = {w.name: jax.ShapeDtypeStruct(w.shape, jnp.int8) for w in weights}
        places = placements({w.name: w.axes for w in weights}, shapes, self.rules, mesh)

        def part(weight: Weight) -> Part:
            place, shape = places[weight.name], shapes[weight.name]
            specs = (place.spec, place.state_spec)
            return Part(weight, place, *(bytes_per_device(shape, spec, mesh) for spec in specs))

        return tuple(map(part, weights))

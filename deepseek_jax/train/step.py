"""One training step: what every device does with its share of the batch, and what they then agree on.

    weights     cast to the dtype that products read, and gathered from the devices that keep parts of them (ZeRO-1)
    for each micro-batch:  loss, gradients (accumulated in float32); in a pipeline by its schedule (`train.pipelined`)
    gradients   summed over the devices that read the same weights, and scattered
    clip        by the global norm
    optimizer   on this device's part of the float32 weights
    router bias b <- b + gamma * sign(mean load - load), from the loads of the whole step

All of it is one program, which runs on every device (`parallel.mesh.per_device`). Between steps each device keeps its
part of the float32 weights and of the moments, and nothing twice. A step whose loss or gradient is not finite leaves
weights, moments and biases as they were; only the counters move.
"""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from deepseek_jax.abstract_model import abstract
from deepseek_jax.compat import hides_collectives, quick_compile
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.kernels import XLA, Kernels
from deepseek_jax.layers.base import Execution, bind, dtype_read, logical_axes, split, take_apart, unstacked
from deepseek_jax.layers.router import max_violation, updated_bias
from deepseek_jax.parallel import zero
from deepseek_jax.parallel.alltoall import Sent, make_exchange
from deepseek_jax.parallel.context import CONTEXT, Context
from deepseek_jax.parallel.meeting import begun_together
from deepseek_jax.parallel.mesh import BATCH, PIPE, REPLICAS, REPLICATED, per_device, place, total
from deepseek_jax.parallel.sharding import (
    check_rules,
    placements,
    state_specs,
    unsharder,
    without_layers,
)
from deepseek_jax.parallel.stage_layout import StageLayout
from deepseek_jax.parallel.vocabulary import Vocabulary
from deepseek_jax.precision.coded import apart, together
from deepseek_jax.precision.matmul import Matmul, PlainMatmul
from deepseek_jax.seeds import random_key
from deepseek_jax.train import reading
from deepseek_jax.train.attempts import Attempts
from deepseek_jax.train.gradients import Gradients, Loss, accumulated
from deepseek_jax.train.loss import Losses, Objective, Stage, Totals, over_devices, totals
from deepseek_jax.train.optimizers import OptimizerFor, Schedule
from deepseek_jax.train.pipelined import ONE_WAY, Pipeline, StageLosses, pipelined
from deepseek_jax.train.state import State, check_like, map_weights
from deepseek_jax.train.trainable import Trainable, divide, everything, join
from deepseek_jax.tree import Path, size

Build = Callable[[Execution, nnx.Rngs], nnx.Module]


@dataclass(frozen=True)
class StepConfig:
    """What a step does besides the objective's loss and the optimizer's update."""

    rate: Schedule  # the learning rate of each step
    clip_norm: float  # largest global norm of the gradients (V3: 1.0)
    micro_batches: int  # parts into which a device splits its share of the batch (gradient accumulation, or a pipeline)
    # balance_rate, balance_rate_stop: gamma, 0 from the step of the stop
    balance_rate: float
    balance_rate_stop: int

    def balance_rate_at(self, step: jax.Array) -> jax.Array:
        """gamma of `step`."""
        return jnp.where(step < self.balance_rate_stop, self.balance_rate, 0.0)


class Report(NamedTuple):
    """What a step reports; float32 scalars but for `auxiliary`, a dict of them, and `loads`."""

    loss: jax.Array  # what was minimised
    # main, mtp, auxiliary: its parts, without their weights (`Losses`); auxiliary losses by name
    main: jax.Array
    mtp: jax.Array
    auxiliary: dict[str, jax.Array]
    gradient_norm: jax.Array  # before clipping
    learning_rate: jax.Array  # of this step
    max_violation: jax.Array  # MaxVio, mean over the routers; 0 without any
    finite: jax.Array  # 1 if the step was taken, 0 if it was skipped
    # skipped, skipped_in_row: the counters after the step
    skipped: jax.Array
    skipped_in_row: jax.Array
    # of the batch's tokens, the same on any mesh: runs whose logs agree on it have read the same text
    checksum: jax.Array
    loads: dict  # tokens per expert of every router, over the whole batch
    sent: Sent  # what exchanges with experts on other devices report, summed over all devices


class Evaluation(NamedTuple):
    """Sums over a batch, each target with its weight; float32 scalars."""

    nats: jax.Array  # cross-entropy
    n_bytes: jax.Array  # UTF-8 bytes that the targets stand for
    weight: jax.Array  # of the targets


class Trainer:
    """A model, an objective, an optimizer and a mesh, as functions over a plain state.

    Args:
        build: makes the model: `build(run: Execution, rngs: nnx.Rngs) -> nnx.Module`.
        mesh: from `parallel.mesh.make_mesh`.
        rules: logical axis -> mesh axis.
        objective: what is minimised (`train.loss.PreTraining(...)`).
        optimizer: makes the optimizer for the model (`train.optimizers.adamw(...)`).
        config: the rest of a step.
        gradients: from the loss of a part and the number of parts to the gradients of a step (`train.gradients`).
        pipeline: the schedule and the division of the layers, where the mesh has a pipeline; its stages take the
            place of `gradients`.
        trainable: which weights are trained, by their path; the others stay as they are.
        compute: dtype of the activations.
        matmul: makes the products with weights from the kernels (`precision.policy`).
        weights: dtype to which the weights that `matmul` reads are cast, once per step (`layers.base.dtype_read`);
            their gradients have it too. Weights that FSDP stores in shards are cast where they are gathered, so that
            their gradients are summed over the devices in float32.
        kernels, remat, unroll: see `Execution`.
        exchange_groups: groups of devices to each of which a token on its way to experts goes once (`Exchange`).
        exchange_kind: how tokens travel (`parallel.alltoall.KINDS`).
        routes: whether blocks report the experts that each token chose, to functions of `with_model`.
        flops_per_token: operations to train on one token, as a function of the sequence length.

    Attributes:
        definition: the model without its weights, as it runs here (`layers.base.bind`).
        abstract: shapes, dtypes and shardings of the state.
        layout: which layers lie where along a pipeline; None without one.
        stored: `abstract` as a checkpoint holds it, stacks in the order of their layers (`store`, `load`).
        axes, placements: the logical axes of each weight, and where it lives.
        build, rules: as given.
        vocab_size: rows of the embedding.
        n_params: trained weights, with those of multi-token prediction.
        step: the compiled `step(state, batch) -> (state, Report)`; the state given is donated. In a pipeline that
            exchanges tokens it is an `Attempts`.
    """

    def __init__(
        self,
        build: Build,
        mesh: Mesh,
        rules: dict,
        objective: Objective,
        optimizer: OptimizerFor,
        config: StepConfig,
        *,
        gradients: Callable[[Loss, int], Gradients] = accumulated,
        pipeline: Pipeline = ONE_WAY,
        trainable: Trainable = everything,
        compute: DTypeLike = jnp.float32,
        matmul: Callable[[Kernels], Matmul] = PlainMatmul,
        weights: DTypeLike = jnp.float32,
        kernels: Kernels = XLA,
        remat: str = "none",
        unroll: int = 1,
        exchange_groups: int = 1,
        exchange_kind: str = "padded",
        routes: bool = False,
        flops_per_token: Callable[[int], float] = lambda seq_len: 0.0,
    ):
        check_rules(rules)
        self.mesh, self.objective, self.config, self.trainable = mesh, objective, config, trainable
        self.build, self.rules, self.flops_per_token = build, rules, flops_per_token
        read = functools.partial(dtype_read, weights=weights, compute=compute)
        self.run = Execution(
            compute=compute,
            matmul=matmul(kernels),
            kernels=kernels,
            remat=remat,
            unroll=unroll,
            exchange=make_exchange(rules, mesh, exchange_groups, exchange_kind),
            unshard=unsharder(rules, mesh, read),
            context=Context(mesh.shape[CONTEXT]),
            routes=routes,
        )
        self._describe(self._model(pipeline), optimizer, read)
        if not self.layout:
            self.step: Any = self._compiled(gradients(self._loss, config.micro_batches))
        elif self.run.exchange:
            self.step = Attempts(lambda level: self._compiled(self._over_stages(remat, pipeline, level), level))
        else:
            self.step = self._compiled(self._over_stages(remat, pipeline))

    def _model(self, pipeline: Pipeline) -> Any:
        """The model as shapes, once it is known where its layers lie along the pipeline."""
        model = self._abstract(self.run)
        n_ranks = self.mesh.shape[PIPE]
        self.layout = pipeline.layout(model, n_ranks, self.config.micro_batches) if n_ranks > 1 else None
        if self.layout:
            self.run = replace(self.run, fetch=self.layout.fetch, vocabulary=Vocabulary(PIPE))
            model = self._abstract(self.run)
        return model

    def _abstract(self, run: Execution) -> Any:
        """The model as shapes, run like this."""
        return abstract(lambda rngs: self.build(run, rngs))

    def _describe(self, model: Any, optimizer: OptimizerFor, read: Callable[[str], DTypeLike]) -> None:
        """Notes what the model consists of and where the state lives; `read` gives the dtype of a role's weights."""
        mesh = self.mesh
        self._build = lambda seed: self.build(self.run, nnx.Rngs(random_key(seed)))
        self.definition, params, router_bias = split(model)
        self.vocab_size, self.n_params = model.config.vocab_size, size(params)
        self.axes, bias_axes = logical_axes(model)
        staged = jax.eval_shape(lambda tree: self._staged(tree), {"params": params, "router_bias": router_bias})
        self.placements = placements(self.axes, staged["params"], self.rules, mesh)
        self._trained_places, _ = divide(self.placements, self.trainable)
        if not jax.tree.leaves(self._trained_places):
            raise ValueError("trainable: no weight is trained. Expected True for the path of at least one.")
        self._reads = reading.reads(model, staged["params"], self.placements, read, self.run.matmul.codes, mesh)
        self.optimizer = optimizer(model, self._trained_places)
        shapes = jax.eval_shape(lambda: self._initial(0))
        self.specs: State = jax.tree.map(lambda _: REPLICATED, shapes) | {
            "params": jax.tree.map(lambda place: place.state_spec, self.placements),
            "router_bias": jax.tree.map(lambda p: p.spec, placements(bias_axes, staged["router_bias"], {}, mesh)),
            "optimizer": state_specs(shapes["optimizer"], shapes["params"], self.placements),
        }
        self.abstract = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            shapes,
            self.specs,
        )
        self.stored = _in_order(self.abstract, self.layout, mesh) if self.layout else self.abstract
        self._whole_biases = jax.jit(self._unstaged, out_shardings=NamedSharding(mesh, REPLICATED))

    def _compiled(self, gradients: Gradients, level: int | None = None) -> Any:
        """The step with gradients from `gradients`, whose exchange has buffers of this `level`; None: of any size."""
        on_device = functools.partial(self._on_device, gradients, level)
        run = per_device(on_device, self.mesh, (self.specs, BATCH), (self.specs, REPLICATED))
        hides = hides_collectives(self.mesh.devices.flat)
        return begun_together(jax.jit(run, donate_argnums=0, compiler_options=hides))

    def _over_stages(self, remat: str, pipeline: Pipeline, level: int = 0) -> Gradients:
        """The gradients over the stages of the pipeline, with buffers of this `level` (`Exchange`)."""
        assert self.layout is not None
        exchange = self.run.exchange and replace(self.run.exchange, level=level)
        run = replace(self.run, fetch=None, unroll=0, remat="none", exchange=exchange)
        overlap = pipeline.overlaps(self.mesh.devices.flat[0].platform)
        return pipelined(self._in_stages(self._abstract(run)), self.layout, remat, overlap)

    def _initial(self, seed: int, given: Mapping = MappingProxyType({})) -> State:
        _, params, router_bias = split(self._build(seed))
        made = {**self._staged({"params": params, "router_bias": router_bias}), **given}
        trained, _ = divide(made["params"], self.trainable)
        counters = dict.fromkeys(("step", "skipped", "skipped_in_row"), jnp.zeros((), jnp.int32))
        return made | {"optimizer": self.optimizer.init(trained)} | counters

    def first_weights(self, seed: int, chosen: Trainable) -> dict:
        """The trained weights of a new state whose paths are `chosen`; inside `jit` no others are made."""
        return divide(split(self._build(seed))[1], chosen)[0]

    def init(self, seed: int, params: dict | None = None, router_bias: dict | None = None) -> State:
        """The state before the first step; every device makes its own part.

        Args:
            seed: of the weights.
            params, router_bias: take their place; host or device arrays of the shapes and dtypes of `stored`. Those
                that lie on the right devices already are not copied: the first step reuses their memory.

        Raises ValueError: given arrays are not those of this model.
        """
        pairs = (("params", params), ("router_bias", router_bias))
        given: State = {name: tree for name, tree in pairs if tree is not None}
        for name, tree in given.items():
            check_like(name, tree, self.stored[name])
        given = place(self.load(given), self.mesh, {name: self.specs[name] for name in given})
        shardings = jax.tree.map(lambda x: x.sharding, {k: x for k, x in self.abstract.items() if k not in given})

        def rest(given: State) -> State:
            made = self._initial(seed, given)
            return {name: made[name] for name in shardings}

        return given | quick_compile(rest, out_shardings=shardings)(given)

    def _staged(self, state: State) -> State:
        """The weights, biases and moments of a state, their stacks laid out along the pipeline if there is one."""
        return map_weights(self.layout.staged, state) if self.layout else state

    def load(self, stored: State) -> State:
        """A state, or some entries of one, as it runs, from what a checkpoint holds (see `stored`)."""
        if not self.layout:
            return stored
        shardings = jax.tree.map(lambda x: x.sharding, {name: self.abstract[name] for name in stored})
        return begun_together(jax.jit(self._staged, out_shardings=shardings))(stored)

    def store(self, state: State) -> State:
        """A state as a checkpoint holds it: the inverse of `load`; the order of layers does not depend on the mesh."""
        if not self.layout:
            return state
        shardings = jax.tree.map(lambda x: x.sharding, {name: self.stored[name] for name in state})
        return jax.jit(self._unstaged, out_shardings=shardings)(state)

    def _unstaged(self, state: State) -> State:
        """The inverse of `_staged`."""
        return map_weights(self.layout.unstaged, state) if self.layout else state

    @functools.cached_property
    def layers(self) -> list[tuple[Path, int]]:
        """The layers of the main model in the order of running: a block's path, and which of its repeats.

        The model is a `layers.decoder.Decoder`.
        """
        model: Any = bind(self.definition, self.abstract["params"], self.abstract["router_bias"])
        repeats = {name: len(jax.tree.leaves(self.stored["params"][name])[0]) for name in model.stacks}
        return [(path, n) for name, group in model.groups.items() for n in range(repeats[name]) for path in group]

    def router_biases(self, state: State) -> dict:
        """The router biases in the order of their layers, on the host; all processes of a run call it together."""
        biases = {"router_bias": state["router_bias"]}
        return jax.device_get(self._whole_biases(biases) if self.layout else biases)["router_bias"]

    def bind(self, params: dict, router_bias: dict, stacks: bool = False) -> nnx.Module:
        """The model with these weights, as a step reads them.

        Those stored in shards are made whole, those of blocks only with `stacks`: otherwise each block is when it runs.
        """
        return self._bound(self.definition, params, router_bias, stacks)

    def _bound(self, definition: nnx.GraphDef, params: dict, router_bias: dict, stacks: bool = False) -> nnx.Module:
        model = bind(definition, params, router_bias)
        if self.run.unshard:
            self.run.unshard(model, stacks)
        return model

    def _in_stages(self, abstract_model: Any) -> StageLosses:
        """The loss in pieces: what one stage adds from its own layers, and what the head adds."""
        definition, _, _ = split(abstract_model)

        def stage(trained: dict, state: State, part: Batch, over: Totals, what: Stage, *x: Any) -> tuple:
            weights = _weights(trained, state)
            weights |= {name: unstacked(weights[name]) for name in abstract_model.stacks}
            model = self._bound(definition, weights, state["router_bias"])
            return self.objective.stage(model, part, over, state["step"], what, *x)

        def head(weight_DV: jax.Array, step: jax.Array, part: Batch, over: Totals, hidden: list) -> tuple:
            loss, *parts = self.objective.head(hidden, weight_DV, self.run, part, over, step)
            return loss, tuple(parts)

        def ids_read(first: Batch, last: Batch) -> jax.Array:
            return jnp.stack([first.ids_BT, *abstract_model.ids_ahead(last.targets_BT)])

        return StageLosses(stage, head, ids_read, abstract_model.begin, self.run)

    def _loss(self, trained: dict, state: State, part: Batch, over: Totals) -> tuple[jax.Array, Losses]:
        model = self.bind(_weights(trained, state), state["router_bias"])
        return self.objective(model, part, over, state["step"])

    def _on_device(self, gradients_of: Gradients, level: int | None, state: State, batch: Batch) -> tuple:
        whole, codes = apart(reading.whole(state["params"], self._reads))
        read, frozen = divide(whole, self.trainable)
        gradients, loss, found = gradients_of(read, state | {"frozen": frozen, "codes": codes}, batch)
        loss, found = over_devices(loss, found)
        gradients = zero.sum_and_scatter(gradients, self._trained_places)
        norm = zero.global_norm(gradients, self._trained_places)
        norm, gradients = jax.lax.optimization_barrier((norm, gradients))  # else XLA makes them again for each moment
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        enough = jnp.append(found.sent.too_small, 0)[-1 if level is None else level] == 0
        rate = self.config.rate(state["step"])
        trained, frozen = divide(state["params"], self.trainable)
        trained, optimizer = self._updated(trained, gradients, norm, rate, state["optimizer"])
        gamma = self.config.balance_rate_at(state["step"])
        loads = self.layout.own_layers(found.loads) if self.layout else found.loads
        router_bias = moved_biases(state["router_bias"], loads, gamma)
        new = {"params": join(trained, frozen), "router_bias": router_bias, "optimizer": optimizer}
        with jax.named_scope("optimizer"):
            new = jax.tree.map(lambda n, o: jnp.where(finite & enough, n, o), new, {key: state[key] for key in new})
        new["step"] = state["step"] + enough
        new["skipped"] = state["skipped"] + (enough & ~finite)
        in_row = jnp.where(finite, 0, state["skipped_in_row"] + 1)
        new["skipped_in_row"] = jnp.where(enough, in_row, state["skipped_in_row"])
        violations = [max_violation(load).ravel() for load in jax.tree.leaves(found.loads)]
        report = Report(
            loss=loss,
            main=found.main,
            mtp=found.mtp,
            auxiliary=found.auxiliary | found.largest,
            gradient_norm=norm,
            learning_rate=rate,
            max_violation=jnp.mean(jnp.concatenate(violations)) if violations else jnp.float32(0),
            finite=finite.astype(jnp.float32),
            skipped=new["skipped"],
            skipped_in_row=new["skipped_in_row"],
            checksum=_checksum(batch.ids_BT, self.run.context),
            loads=found.loads,
            sent=found.sent,
        )
        return new, report

    def as_read(self, params: dict) -> dict:
        """The weights of a state in the dtypes in which a step reads them; outside of `per_device`."""
        return reading.as_read(params, self._reads)

    @jax.named_scope("optimizer")
    def _updated(self, trained: dict, gradients: dict, norm: jax.Array, rate: jax.Array, state: dict) -> tuple:
        """This device's parts of the trained weights and of the optimizer's state after its update."""
        shrink = jnp.minimum(1.0, self.config.clip_norm / (norm + 1e-6))
        gradients = jax.tree.map(lambda g: g * shrink, gradients)
        return self.optimizer.update(gradients, state, trained, rate)

    def evaluator(self, byte_lengths_V: jax.Array) -> Callable[[State, Batch], Evaluation]:
        """A compiled `evaluate(state, batch) -> Evaluation`, of the main model alone.

        `byte_lengths_V` are the UTF-8 bytes that each token id stands for, 0 for special tokens.
        """

        def on_device(params: dict, router_bias: dict, batch: Batch) -> Evaluation:
            return self.evaluation(self.bind(reading.whole(params, self._reads), router_bias), batch, byte_lengths_V)

        specs = (self.specs["params"], self.specs["router_bias"], BATCH)
        run = begun_together(jax.jit(per_device(on_device, self.mesh, specs, REPLICATED)))
        return lambda state, batch: run(state["params"], state["router_bias"], batch)

    def with_model(
        self, function: Callable[[Any, Any], Any], *, stacks: bool = False, loop: bool = True
    ) -> Callable[[State, Any], Any]:
        """A compiled `run(state, rows)`: `function(model, rows)` on every device, with its part of the rows.

        `rows` is a tree of arrays [rows, columns], and so is the result; no gradient, no state is changed. With
        `stacks` weights stored in shards are made whole once, as generation needs them, which runs each block often:
        `function` then runs blocks by `run_cached` alone, for other ways would make them whole again. Without `loop`,
        which asks for `stacks`, it runs layers one by one, each with weights and a cache of its own.
        """
        definition = self.definition if loop else split(self._abstract(replace(self.run, unroll=0)))[0]

        def on_device(params: dict, router_bias: dict, rows: Any) -> Any:
            model = self._bound(definition, reading.whole(params, self._reads), router_bias, stacks)
            if not loop:
                take_apart(model)
            return function(model, rows)

        specs = (self.specs["params"], self.specs["router_bias"], BATCH)
        run = begun_together(jax.jit(per_device(on_device, self.mesh, specs, BATCH)))
        return lambda state, rows: run(state["params"], state["router_bias"], rows)

    def evaluation(self, model: nnx.Module, batch: Batch, byte_lengths_V: jax.Array) -> Evaluation:
        """The sums over all devices, from a device's share of a batch; `evaluator` compiles it."""
        nats = self.objective.nats(model, batch)
        lengths = jnp.where(batch.targets_BT >= 0, byte_lengths_V[jnp.maximum(batch.targets_BT, 0)], 0)
        n_bytes = jnp.sum(lengths * batch.weights_BT)
        return total(Evaluation(nats, n_bytes, jnp.asarray(totals(batch).weight)), REPLICAS)


def _weights(trained: dict, state: State) -> dict:
    """All weights as a step reads them: trained ones, and what a state holds of the others and of codes."""
    return together(join(trained, state["frozen"]), state["codes"])


def _in_order(abstract: State, layout: StageLayout, mesh: Mesh) -> State:
    """`abstract` with stacks in the order of their layers; if these do not divide, they are split elsewhere."""
    shapes = jax.eval_shape(functools.partial(map_weights, layout.unstaged), abstract)

    def one(shape: jax.ShapeDtypeStruct, staged: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        if shape.shape == staged.shape:
            return staged
        sharding = NamedSharding(mesh, without_layers(staged.sharding.spec, shape.shape, mesh))
        return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)

    return jax.tree.map(one, shapes, abstract)


def moved_biases(router_bias: dict, loads: dict, gamma: jax.Array) -> dict:
    """The router biases after a step's `loads`, a prefix of their tree; a family without biases has none to move.

    Integers among them are tables of experts by token id, which stay.
    """
    if not router_bias:
        return router_bias

    def moved(load: jax.Array, bias: jax.Array) -> jax.Array:
        return updated_bias(bias, load, gamma) if jnp.issubdtype(bias.dtype, jnp.floating) else bias

    return jax.tree.map(lambda load, biases: jax.tree.map(functools.partial(moved, load), biases), loads, router_bias)


def _checksum(ids_BT: jax.Array, context: Context) -> jax.Array:
    """uint32 sum over all devices of id * (2 position + 1), the order of the sequences left out."""
    odd_T = 2 * context.places(ids_BT.shape[1]).astype(jnp.uint32) + 1
    return total(jnp.sum(ids_BT.astype(jnp.uint32) * odd_T), REPLICAS)

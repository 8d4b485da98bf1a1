"""One training step: what every device does with its share of the batch, and what they then agree on.

    for each micro-batch:  loss, gradients (accumulated in float32)
    gradients   summed over the devices that hold the same weights, and scattered (ZeRO-1)
    clip        by the global norm
    optimizer   on this device's part; the new weights are gathered
    router bias b <- b + gamma * sign(mean load - load), from the loads of the whole step

All of it is one program, run once per device (`parallel.mesh.per_device`).  A step whose loss or gradient is not finite
leaves weights, moments and biases as they were; only the counters move.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.typing import DTypeLike

from deepseek_jax.compat import quick_compile
from deepseek_jax.layers.base import Execution, bind, logical_axes, split
from deepseek_jax.layers.router import max_violation, updated_bias
from deepseek_jax.parallel import zero
from deepseek_jax.parallel.mesh import BATCH, REPLICATED, per_device, total
from deepseek_jax.parallel.sharding import check_rules, expert_axis, placements, state_specs, unsharder
from deepseek_jax.seeds import random_key
from deepseek_jax.train.loss import Losses, Totals, Weights, losses, totals
from deepseek_jax.train.optimizers import OptimizerFor, Schedule

State = dict  # {"params", "router_bias", "optimizer", "step", "skipped", "skipped_in_row"}


@dataclass(frozen=True)
class StepConfig:
    """What a step does besides the optimizer's update.

    Attributes:
        rate: the learning rate of each step.
        clip_norm: largest global norm of the gradients (V3: 1.0).
        micro_batches: parts a device cuts its share of the batch into (gradient accumulation).
        chunk: tokens whose logits exist at a time.
        mask_documents: whether attention stays inside a document.
        mtp_weight, mtp_weight_final, mtp_weight_switch: lambda before and from the step of the switch.
        balance_rate, balance_rate_stop: gamma, 0 from the step of the stop.
        auxiliary: alpha of each auxiliary loss, by its name.
    """

    rate: Schedule
    clip_norm: float
    micro_batches: int
    chunk: int
    mask_documents: bool
    mtp_weight: float
    mtp_weight_final: float
    mtp_weight_switch: int
    balance_rate: float
    balance_rate_stop: int
    auxiliary: Mapping[str, float]

    def mtp_weight_at(self, step: jax.Array) -> jax.Array:
        """lambda of `step`."""
        return jnp.where(step < self.mtp_weight_switch, self.mtp_weight, self.mtp_weight_final)

    def balance_rate_at(self, step: jax.Array) -> jax.Array:
        """gamma of `step`."""
        return jnp.where(step < self.balance_rate_stop, self.balance_rate, 0.0)


class Report(NamedTuple):
    """What a step reports; float32 scalars but for `auxiliary`, a dict of them, and `loads`.

    Attributes:
        loss: what was minimised.
        main, mtp, auxiliary: its parts, without their weights (`Losses`); auxiliary losses by name.
        gradient_norm: before clipping.
        learning_rate: of this step.
        max_violation: MaxVio, mean over the routers; 0 without any.
        finite: 1 if the step was taken, 0 if it was skipped.
        skipped, skipped_in_row: the counters after the step.
        checksum: of the batch's tokens, the same on any mesh: runs whose logs agree on it have read the same text.
        loads: tokens per expert of every router, over the whole batch.
    """

    loss: jax.Array
    main: jax.Array
    mtp: jax.Array
    auxiliary: dict[str, jax.Array]
    gradient_norm: jax.Array
    learning_rate: jax.Array
    max_violation: jax.Array
    finite: jax.Array
    skipped: jax.Array
    skipped_in_row: jax.Array
    checksum: jax.Array
    loads: dict


class Evaluation(NamedTuple):
    """Sums over a batch, each target with its weight; float32 scalars.

    Attributes:
        nats: cross-entropy.
        n_bytes: UTF-8 bytes that the targets stand for.
        weight: of the targets.
    """

    nats: jax.Array
    n_bytes: jax.Array
    weight: jax.Array


class Trainer:
    """A model, an optimizer and a mesh, as functions over a plain state.

    Args:
        build: makes the model: `build(run: Execution, rngs: nnx.Rngs) -> nnx.Module`.
        mesh: from `parallel.mesh.make_mesh`.
        rules: logical axis -> mesh axis.
        step_config: the loss and its schedules.
        optimizer: makes the optimizer for the model (`train.optimizers.adamw(...)`).
        compute: dtype of the activations.
        remat, unroll: see `Execution`.
        flops_per_token: operations to train on one token, as a function of the sequence length.

    Attributes:
        definition: the model without its weights, as it runs here (`layers.base.bind`).
        abstract: shapes, dtypes and shardings of the state.
        placements: where each weight lives.
        vocab_size: rows of the embedding.
        n_params: trained weights, with those of multi-token prediction.
        step: the compiled `step(state, batch) -> (state, Report)`; the state given is donated.
    """

    def __init__(
        self,
        build: Callable[[Execution, nnx.Rngs], nnx.Module],
        mesh: Mesh,
        rules: dict,
        step_config: StepConfig,
        optimizer: OptimizerFor,
        *,
        compute: DTypeLike = jnp.float32,
        remat: str = "none",
        unroll: int = 1,
        flops_per_token: Callable[[int], float] = lambda seq_len: 0.0,
    ):
        check_rules(rules)
        self.mesh, self.config = mesh, step_config
        self.flops_per_token = flops_per_token
        self.run = Execution(
            compute=compute,
            remat=remat,
            unroll=unroll,
            expert_axis=expert_axis(rules, mesh),
            unshard=unsharder(rules, mesh),
        )
        self._build = lambda seed: build(self.run, nnx.Rngs(random_key(seed)))
        model = nnx.eval_shape(lambda: self._build(0))
        self.definition, params, _ = split(model)
        self.vocab_size = model.config.vocab_size
        self.n_params = sum(x.size for x in jax.tree.leaves(params))
        axes, _ = logical_axes(model)
        self.placements = placements(axes, params, rules, mesh)
        self.optimizer = optimizer(model)
        shapes = jax.eval_shape(lambda: self._initial(0))
        self.specs = self._specs(shapes)
        self.abstract = jax.tree.map(
            lambda x, spec: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec)),
            shapes,
            self.specs,
        )
        self.step = self._compile()

    def _specs(self, state: State) -> State:
        return jax.tree.map(lambda _: REPLICATED, state) | {
            "params": jax.tree.map(lambda place: place.spec, self.placements),
            "optimizer": state_specs(state["optimizer"], state["params"], self.placements),
        }

    def _initial(self, seed: int) -> State:
        _, params, router_bias = split(self._build(seed))
        zero_count = jnp.zeros((), jnp.int32)
        return {
            "params": params,
            "router_bias": router_bias,
            "optimizer": self.optimizer.init(params),
            "step": zero_count,
            "skipped": zero_count,
            "skipped_in_row": zero_count,
        }

    def init(self, seed: int) -> State:
        """The state before the first step; every device makes its own part."""
        shardings = jax.tree.map(lambda x: x.sharding, self.abstract)
        return quick_compile(self._initial, out_shardings=shardings, static_argnums=0)(seed)

    def bind(self, params: dict, router_bias: dict) -> nnx.Module:
        """The model with these weights, those stored in shards made whole."""
        model = bind(self.definition, params, router_bias)
        if self.run.unshard:
            self.run.unshard(model)
        return model

    def _compile(self) -> Callable:
        specs = (self.specs, BATCH)
        run = per_device(self._on_device, self.mesh, specs, (self.specs, REPLICATED))
        return jax.jit(run, donate_argnums=0)

    def _on_device(self, state: State, batch) -> tuple[State, Report]:
        gradients, found = self._gradients(state, batch)
        found = total(found)
        gradients = zero.sum_and_scatter(gradients, self.placements)
        norm = zero.global_norm(gradients, self.placements)
        loss = found.weighted(Weights(self.config.mtp_weight_at(state["step"]), self.config.auxiliary))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        rate = self.config.rate(state["step"])
        new = self._updated(state, gradients, norm, rate, found.loads)
        new = jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, {key: state[key] for key in new})
        new["step"] = state["step"] + 1
        new["skipped"] = state["skipped"] + ~finite
        new["skipped_in_row"] = jnp.where(finite, 0, state["skipped_in_row"] + 1)
        violations = [max_violation(load).ravel() for load in jax.tree.leaves(found.loads)]
        report = Report(
            loss=loss,
            main=found.main,
            mtp=found.mtp,
            auxiliary=found.auxiliary,
            gradient_norm=norm,
            learning_rate=rate,
            max_violation=jnp.mean(jnp.concatenate(violations)) if violations else jnp.float32(0),
            finite=finite.astype(jnp.float32),
            skipped=new["skipped"],
            skipped_in_row=new["skipped_in_row"],
            checksum=_checksum(batch.ids_BT),
            loads=found.loads,
        )
        return new, report

    def _gradients(self, state: State, batch) -> tuple[dict, Losses]:
        """Gradients and losses of this device's share of the batch, one micro-batch after the other."""
        c = self.config
        over = total(totals(batch))
        weights = Weights(c.mtp_weight_at(state["step"]), c.auxiliary)

        def loss(params: dict, part) -> tuple[jax.Array, Losses]:
            model = self.bind(params, state["router_bias"])
            return losses(model, part, over, weights, chunk=c.chunk, mask=c.mask_documents)

        gradient = jax.grad(loss, has_aux=True)
        if c.micro_batches == 1:
            return gradient(state["params"], batch)
        parts = jax.tree.map(lambda x: x.reshape(c.micro_batches, -1, *x.shape[1:]), batch)

        def add(sums: tuple, part) -> tuple[tuple, None]:
            return jax.tree.map(jnp.add, sums, gradient(state["params"], part)), None

        shapes = jax.eval_shape(gradient, state["params"], jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, zeros, parts)[0]

    def _updated(self, state: State, gradients: dict, norm: jax.Array, rate: jax.Array, loads: dict) -> State:
        """The state after the optimizer's and the router-bias update."""
        shrink = jnp.minimum(1.0, self.config.clip_norm / (norm + 1e-6))
        gradients = jax.tree.map(lambda g: g * shrink, gradients)
        parts = zero.scatter(state["params"], self.placements)
        parts, optimizer = self.optimizer.update(gradients, state["optimizer"], parts, rate)
        gamma = self.config.balance_rate_at(state["step"])
        router_bias = moved_biases(state["router_bias"], loads, gamma)
        params = zero.gather(parts, self.placements)
        return {"params": params, "router_bias": router_bias, "optimizer": optimizer}

    def evaluator(self, byte_lengths_V: jax.Array) -> Callable[[State, object], Evaluation]:
        """A compiled `evaluate(state, batch) -> Evaluation`, of the main model alone.

        Args:
            byte_lengths_V: UTF-8 bytes that each token id stands for, 0 for special tokens.
        """

        def on_device(params: dict, router_bias: dict, batch) -> Evaluation:
            model = self.bind(params, router_bias)
            no_weights = Weights(0.0, dict.fromkeys(self.config.auxiliary, 0.0))
            chunk, mask = self.config.chunk, self.config.mask_documents
            _, found = losses(model, batch, Totals(1.0, 1.0), no_weights, chunk=chunk, mask=mask)
            lengths = jnp.where(batch.targets_BT >= 0, byte_lengths_V[jnp.maximum(batch.targets_BT, 0)], 0)
            n_bytes = jnp.sum(lengths * batch.weights_BT)
            return total(Evaluation(found.main, n_bytes, totals(batch).weight))

        specs = (self.specs["params"], self.specs["router_bias"], BATCH)
        run = jax.jit(per_device(on_device, self.mesh, specs, REPLICATED))
        return lambda state, batch: run(state["params"], state["router_bias"], batch)


def moved_biases(router_bias: dict, loads: dict, gamma: jax.Array) -> dict:
    """The router biases after a step's `loads`, a prefix of their tree; a family without biases has none to move."""
    if not router_bias:
        return router_bias
    return jax.tree.map(
        lambda load, biases: jax.tree.map(lambda bias: updated_bias(bias, load, gamma), biases), loads, router_bias
    )


def _checksum(ids_BT: jax.Array) -> jax.Array:
    """uint32 sum over all devices of id * (2 position + 1), the order of the sequences left out."""
    odd_T = 2 * jnp.arange(ids_BT.shape[1], dtype=jnp.uint32) + 1
    return total(jnp.sum(ids_BT.astype(jnp.uint32) * odd_T))

"""Redundant experts for evaluation and generation: busy experts have replicas, so that devices have equally much to do.

From the measured load of each expert, `parallel.eplb` places the replicas of each layer. The weights of routed experts
are then copied to their slots, and the network, built with `Execution.redundant`, sends a token to one of the replicas
of each expert that it chose. It computes what it computed before; router biases and statistics are still per expert.

Training has none: replicas would have to share their gradients.
Source: V3 section 3.4.1, which moves the replicas every ten minutes.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from deepseek_jax.abstract_model import abstract
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Tree, bind, logical_axes, split
from deepseek_jax.layers.router import max_violation
from deepseek_jax.parallel import eplb
from deepseek_jax.parallel.eplb import Placement
from deepseek_jax.parallel.meeting import begun_together
from deepseek_jax.parallel.mesh import BATCH, REPLICATED, per_device, shardings
from deepseek_jax.parallel.sharding import EXPERTS, expert_axis, placements
from deepseek_jax.train.step import Evaluation, State, Trainer

Placed = dict[tuple[str, ...], Placement]  # by the path of the stack of layers, as in `Report.loads`


def placed(loads: Tree, n_redundant: int, n_devices: int, n_groups: int = 1, n_nodes: int = 1) -> Placed:
    """Returns where the replicas of each stack's experts go, from `Report.loads`: tokens per expert, [E] or [L, E].

    `n_groups` are those of the router; groups stay on one node each if they divide by `n_nodes`. Raises UserError if
    the experts and `n_redundant` more do not divide over the devices.
    """
    found = {path: np.atleast_2d(np.asarray(load)) for path, load in flatten_dict(loads).items()}
    return {
        path: eplb.place(load_LE, load_LE.shape[1] + n_redundant, n_devices, n_groups, n_nodes)
        for path, load_LE in found.items()
    }


def imbalance(loads: Tree, where: Placed, n_devices: int) -> tuple[float, float]:
    """Returns (without, with replicas): load of the fullest device / mean load - 1, mean over the layers."""
    pairs = []
    for path, load in flatten_dict(loads).items():
        load_LE = np.atleast_2d(np.asarray(load))
        in_order = load_LE.reshape(len(load_LE), n_devices, -1).sum(axis=-1)
        devices = in_order, eplb.device_loads(load_LE, where[path], n_devices)
        pairs.append(np.stack([max_violation(each) for each in devices], axis=1))
    before, after = np.concatenate(pairs).mean(axis=0).tolist()
    return before, after


def with_replicas(params: Tree, router_bias: Tree, axes: Tree, where: Placed) -> tuple[Tree, Tree]:
    """Returns the weights and router biases of the network with `Execution.redundant`.

    `axes` are the logical axes of `params`. Of a stack, one layer is copied after the other, so that devices that hold
    parts of the experts need memory for all experts of one layer only.
    """
    weights, biases = flatten_dict(params), flatten_dict(router_bias)
    for path, names in flatten_dict(axes).items():
        if EXPERTS in names:
            placement = next(found for key, found in where.items() if path[: len(key)] == key)
            stacked = names[0] != EXPERTS
            expert_LS, slot_LER = placement.expert_LS.astype(np.int32), eplb.slots(placement)
            weights[path] = _copied(weights[path], expert_LS) if stacked else weights[path][expert_LS[0]]
            biases[(*path[:-1], "slot_ER")] = jnp.asarray(slot_LER if stacked else slot_LER[0])
    return unflatten_dict(weights), unflatten_dict(biases)


def _copied(w_LXDF: jax.Array, expert_LS: np.ndarray) -> jax.Array:
    return jax.lax.map(lambda layer: layer[0][layer[1]], (w_LXDF, jnp.asarray(expert_LS)))


class RedundantEvaluator:
    """As `Trainer.evaluator`, with redundant experts.

    Args:
        trainer: whose model is judged; not of a pipeline.
        byte_lengths_V: UTF-8 bytes that each token id stands for.
        n_redundant: replicas beside one of each expert.
        n_groups, n_nodes: as for `placed`.

    Raises UserError: the trainer has a pipeline, or the replicas do not divide over the devices.
    """

    def __init__(
        self, trainer: Trainer, byte_lengths_V: jax.Array, n_redundant: int, *, n_groups: int = 1, n_nodes: int = 1
    ):
        if trainer.layout:
            raise UserError(
                "redundant experts in a pipeline: stages hold one of each. Set config.loop.eval_redundant=0."
            )
        self.trainer, self.n_redundant, self._nodes = trainer, n_redundant, (n_groups, n_nodes)
        axis = expert_axis(trainer.rules, trainer.mesh)
        self.n_devices = trainer.mesh.shape[axis] if axis else 1
        if n_redundant % self.n_devices:
            raise UserError(
                f"{n_redundant} redundant experts over {self.n_devices} devices: expected equally many on each. Set "
                f"config.loop.eval_redundant to a multiple of {self.n_devices}."
            )
        run = replace(trainer.run, redundant=n_redundant)
        model: Any = abstract(lambda rngs: trainer.build(run, rngs))
        definition, params, router_bias = split(model)
        axes, bias_axes = logical_axes(model)
        if not any(EXPERTS in names for names in flatten_dict(axes).values()):
            raise UserError("redundant experts: the model has no routed experts. Set config.loop.eval_redundant=0.")
        rules, mesh = trainer.rules, trainer.mesh
        places = placements(axes, params, rules, mesh), placements(bias_axes, router_bias, {}, mesh)
        specs = jax.tree.map(lambda place: place.spec, places)
        self._shardings = shardings(mesh, specs)

        def on_device(weights: tuple, batch: Batch) -> Evaluation:
            bound = bind(definition, *weights)
            if run.unshard:
                run.unshard(bound)
            return trainer.evaluation(bound, batch, byte_lengths_V)

        self._run = begun_together(jax.jit(per_device(on_device, mesh, (specs, BATCH), REPLICATED)))

    def placed(self, loads: Tree) -> Placed:
        """Returns where replicas go for these loads of the experts, `Report.loads`."""
        return placed(jax.device_get(loads), self.n_redundant, self.n_devices, *self._nodes)

    def weights(self, state: State, where: Placed) -> tuple[Tree, Tree]:
        """Returns the weights and router biases of a state, with replicas, as evaluation reads them."""

        def copied(params: Tree, router_bias: Tree) -> tuple[Tree, Tree]:
            return with_replicas(self.trainer.as_read(params), router_bias, self.trainer.axes, where)

        return jax.jit(copied, out_shardings=self._shardings)(state["params"], state["router_bias"])

    def __call__(self, weights: tuple[Tree, Tree], batch: Batch) -> Evaluation:
        """Returns the sums over a batch."""
        return self._run(weights, batch)

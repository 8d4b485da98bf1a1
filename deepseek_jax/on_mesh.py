"""How a model generates on several devices: requests of their own, and experts that are divided over some of them.

Busy experts may have replicas, so that devices have equally much to do (`train.redundant`; V3 section 3.4.2).
"""

from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deepseek_jax.abstract_model import run_as
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Execution, Tree, bind, logical_axes, split
from deepseek_jax.parallel.alltoall import make_exchange
from deepseek_jax.parallel.mesh import EXPERT, shardings
from deepseek_jax.parallel.replicas import RULES, Replicas, check_axes, of_codes, specs_of_weights
from deepseek_jax.parallel.sharding import EXPERTS
from deepseek_jax.precision.fp8_weight import Fp8Weight
from deepseek_jax.train.redundant import Placed, placed, with_replicas


@dataclass(frozen=True, eq=False)  # equal to itself only: arrays have no one answer to ==
class Redundant:
    """Replicas of experts beside one of each."""

    n: int  # in each layer, a multiple of the devices that share the experts
    # tokens that chose each expert, [L, E] of each stack: `serve.loads.ExpertLoads.counts`, or `Report.loads` of a run
    loads: Tree


def replicas(
    config: ConfigDict,
    definition: nnx.GraphDef,
    weights: tuple[Tree, Tree],
    mesh: Mesh,
    redundant: Redundant | None = None,
) -> Replicas:
    """Returns what each device of a mesh runs and holds.

    Args:
        config: of the model.
        definition: the model as one device alone runs it.
        weights: its parameters and router biases.
        mesh: `parallel.mesh.make_mesh` with sizes of `data` and `expert`.
        redundant: replicas of the experts that have most to do; None: one of each expert.

    Raises UserError: the experts or their replicas do not divide over `expert`, or the mesh has other axes.
    """
    check_axes(mesh)
    alone: Any = bind(definition, *weights)
    run = replace(alone.run, exchange=make_exchange(RULES, mesh))
    one_of_each, axes = _made(config, run, mesh)
    if redundant is None:
        return replace(one_of_each, weights=of_codes(one_of_each.weights, weights))
    if any(isinstance(weight, Fp8Weight) for weight in flatten_dict(weights[0]).values()):
        raise UserError(
            "redundant experts of weights in FP8: expected one of each expert. Load weights='wide' (--weights=wide)."
        )
    where = _placed(config, axes, weights[0], redundant, mesh.shape[EXPERT])
    more, _ = _made(config, replace(run, redundant=redundant.n), mesh)
    copied = jax.jit(
        lambda params, router_bias: with_replicas(params, router_bias, axes, where),
        out_shardings=shardings(mesh, more.weights),
    )
    return replace(more, prepared=lambda weights: copied(*one_of_each.place(weights)))


def with_slots(
    config: ConfigDict, definition: nnx.GraphDef, weights: tuple[Tree, Tree], redundant: Redundant
) -> nnx.GraphDef:
    """The model as one device alone runs it, with the weights that `Replicas.place` makes of its own."""
    alone: Any = bind(definition, *weights)
    return split(run_as(config, replace(alone.run, redundant=redundant.n)))[0]


def _made(config: ConfigDict, run: Execution, mesh: Mesh) -> tuple[Replicas, Tree]:
    """(what each device runs and holds, logical axes of the weights) of a model that is run so."""
    model = run_as(config, run)
    own, *shapes = split(model)
    return Replicas(mesh, own, specs_of_weights(logical_axes(model), tuple(shapes), mesh)), logical_axes(model)[0]


def _placed(config: ConfigDict, axes: Tree, params: Tree, redundant: Redundant, n_devices: int) -> Placed:
    """Where the replicas go; experts of multi-token prediction whose loads are not known are equally busy.

    Raises UserError: the model has no routed experts, other loads are not known or of other layers, or the replicas do
    not divide over the devices.
    """
    routed = [path for path, names in flatten_dict(axes).items() if EXPERTS in names]
    if not routed or redundant.n < 1 or redundant.n % n_devices:
        raise UserError(
            f"{redundant.n} redundant experts for {config.name} over {n_devices} devices: expected a model with routed "
            f"experts, and equally many replicas on each device. Give a multiple of {n_devices}, or none."
        )
    loads, weights = flatten_dict(redundant.loads), flatten_dict(params)
    for path in routed:
        found = next((load for key, load in loads.items() if path[: len(key)] == key), None)
        if path[0] != "mtp" and found is not None and np.shape(found) != weights[path].shape[:2]:
            raise UserError(
                f"loads of {path[0]} of shape {np.shape(found)}: expected {weights[path].shape[:2]}, layers and "
                f"experts of {config.name}. Give the loads of this model."
            )
        if found is None:
            if path[0] != "mtp":
                raise UserError(
                    f"loads of {', '.join(map('.'.join, loads)) or 'nothing'}: expected those of {path[0]}. Give "
                    "`ExpertLoads.counts` of an engine with this model."
                )
            loads[path[:-1]] = np.ones((1, config.model.n_experts))
    return placed(unflatten_dict(loads), redundant.n, n_devices, config.model.get("n_groups", 1))

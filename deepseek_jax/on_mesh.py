"""How a model generates on several devices: requests of their own, and experts that are divided over some of them."""

from dataclasses import replace
from typing import Any

from flax import nnx
from jax.sharding import Mesh
from ml_collections import ConfigDict

from deepseek_jax.abstract_model import run_as
from deepseek_jax.layers.base import Tree, bind, logical_axes, split
from deepseek_jax.parallel.alltoall import make_exchange
from deepseek_jax.parallel.replicas import RULES, Replicas, check_axes, specs_of_weights


def replicas(config: ConfigDict, definition: nnx.GraphDef, weights: tuple[Tree, Tree], mesh: Mesh) -> Replicas:
    """Returns what each device of a mesh runs and holds.

    Args:
        config: of the model.
        definition: the model as one device alone runs it.
        weights: its parameters and router biases.
        mesh: `parallel.mesh.make_mesh` with sizes of `data` and `expert`.

    Raises UserError: the experts do not divide over `expert`, or the mesh has other axes.
    """
    check_axes(mesh)
    alone: Any = bind(definition, *weights)
    model = run_as(config, replace(alone.run, exchange=make_exchange(RULES, mesh)))
    own, *shapes = split(model)
    return Replicas(mesh, own, specs_of_weights(logical_axes(model), tuple(shapes), mesh))

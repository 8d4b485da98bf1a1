"""Devices that generate, each with requests and pages of its own; the routed experts are divided over some of them.

As in DeepSeek's layout of inference (V3 section 3.4) attention is data-parallel: the rows of a batch, and the pages of
their caches, lie on the devices along `data` and `expert`. Along `expert` each device holds some of the experts, and
tokens are sent to them. All devices run one program at the same time, because they exchange tokens.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import DATA, EXPERT, REPLICATED, SEQUENCES, per_device, place, size, total
from deepseek_jax.parallel.sharding import EXPERTS, placements
from deepseek_jax.precision.fp8_weight import Fp8Weight

RULES = {EXPERTS: EXPERT}
ROWS = P(SEQUENCES)  # axis 0: rows, or pages
STACKED_ROWS = P(None, SEQUENCES)  # axis 0: layers


@dataclass(frozen=True)
class Replicas:
    """The devices of a mesh, and what each of them runs and holds.

    `definition` is the model as one device runs it, with an exchange; `weights` are the specs of its parameters and
    router biases; `prepared`, if there is anything to do, makes these of the model's own.
    """

    mesh: Mesh
    definition: nnx.GraphDef
    weights: Any
    prepared: Callable[[Any], Any] | None = None

    @property
    def n(self) -> int:
        """The number of devices."""
        return size(self.mesh, SEQUENCES)

    def place(self, weights: Any) -> Any:
        """Weights on their devices."""
        return place(self.prepared(weights) if self.prepared else weights, self.mesh, self.weights)

    def zeros(self, one: Any, all_of_them: Any) -> Any:
        """Zeros with the shapes `all_of_them`, divided along the axis in which these differ from those of `one`."""

        def made(few: jax.ShapeDtypeStruct, many: jax.ShapeDtypeStruct) -> jax.Array:
            return jnp.zeros(many.shape, many.dtype, device=NamedSharding(self.mesh, _divided(few, many)))

        return jax.tree.map(made, one, all_of_them)

    def anywhere(self, flag_B: jax.Array) -> jax.Array:
        """Whether a flag is set on any of the devices, the same on all; within `on_each` only."""
        return total(jnp.any(flag_B).astype(jnp.int32), SEQUENCES) > 0

    def sharding(self) -> NamedSharding:
        """Of arrays with rows on their first axis."""
        return NamedSharding(self.mesh, ROWS)

    def spec(self, leaf: Any) -> P:
        """Where an array lies: as it does already, or else by rows."""
        is_placed = isinstance(leaf, jax.Array) and isinstance(leaf.sharding, NamedSharding)
        return leaf.sharding.spec if is_placed else ROWS

    def abstract(self, tree: Any) -> Any:
        """Arrays as shapes with their places."""
        return jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(self.mesh, self.spec(a))), tree
        )

    def on_each(self, function: Callable, given: dict[str, Any], outputs: Any) -> Callable:
        """`function` of keywords like those in `given`, on each device with its part of them; specs of all results."""
        specs = {name: jax.tree.map(self.spec, tree) for name, tree in given.items()}
        run = per_device(lambda given: function(**given), self.mesh, (specs,), outputs)
        return lambda **given: run(given)


def specs_of_weights(axes: tuple, shapes: tuple, mesh: Mesh) -> tuple:
    """Specs of (parameters, router biases): experts over `expert`, all others on every device.

    Raises UserError: the experts do not divide, or the mesh has other axes.
    """
    check_axes(mesh)
    rules: tuple[Mapping[str, str], ...] = (RULES, {})
    found = [placements(*one, mesh) for one in zip(axes, shapes, rules, strict=True)]
    return tuple(jax.tree.map(lambda placement: placement.spec, tree) for tree in found)


def of_codes(specs: Any, weights: Any) -> Any:
    """The same specs, where a weight is in FP8 for its codes and scales: layers and experts are their first axes too.

    Along other axes `RULES` divide nothing.
    """

    def of_parts(spec: P, weight: Any) -> P:
        return P(*spec[: weight.codes.ndim - 2]) if isinstance(weight, Fp8Weight) else spec

    return jax.tree.map(of_parts, specs, weights)


def check_axes(mesh: Mesh) -> None:
    """Raises UserError if a mesh divides anything but rows and experts."""
    for axis, n in mesh.shape.items():
        if axis not in (DATA, EXPERT) and n > 1:
            raise UserError(
                f"config.mesh.{axis}={n}: generation divides rows over {DATA} and {EXPERT}, and experts over {EXPERT}. "
                f"Set {axis} to 1."
            )


def _divided(few: jax.ShapeDtypeStruct, many: jax.ShapeDtypeStruct) -> P:
    differing = [axis for axis, sizes in enumerate(zip(few.shape, many.shape, strict=True)) if sizes[0] != sizes[1]]
    return P(*([None] * differing[0]), SEQUENCES) if differing else REPLICATED

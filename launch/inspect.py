"""Show every weight of a model: shape, logical axes, where it is split, bytes on each device. No array is made.

    deepseek-jax inspect --config=v3_671b
    deepseek-jax inspect --config=v3_671b --config.mesh.expert=64 --devices=256
    deepseek-jax inspect --workdir=runs/tiny_v3             # a run or published weights: its numbers as well
    deepseek-jax inspect --config=tiny_v2 --show-config     # every key of the resolved config

With --config.lora.rank=N the adapters are rows too, and no other weight has moments of the optimizer.

The mesh may be of any size: its devices need not be here. Without --devices, --config.mesh.data=-1 counts as 1.
"""

# The file bears a standard module's name because the verb does. That does no harm: it is only ever imported as
# deepseek_jax.launch.inspect, and no file of this folder is meant to be run by its path.

import math
from typing import TYPE_CHECKING, Any, NamedTuple

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.bounds import whole
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options
from deepseek_jax.launch._tables import print_table
from deepseek_jax.units import binary

if TYPE_CHECKING:
    from deepseek_jax.parallel.sharding import Placement

DEFAULT = "tiny_v3"
RIGHT = ("weight/device", "master/device", "optimizer/device")
HEADER = ("weight", "shape", "dtype", "logical axes", "split over", *RIGHT)
EXTRA = {
    "devices": (int, 0, "devices of the mesh; 0: as many as config.mesh says", whole(0, 10**9)),
    "show_config": (bool, False, "print every key of the resolved config instead, as a config file would set it"),
}


class Weight(NamedTuple):
    """One row of the table; bytes are those on one device, dtype is that in which a step reads the weight."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    axes: tuple[str | None, ...]
    spec: tuple
    weight_bytes: int
    master_bytes: int  # of the float32 weight; 0 where a step reads just that
    optimizer_bytes: int


def main(argv: list[str]) -> int:
    """Runs the verb; returns the exit code."""
    of_a_run = any(word.startswith("--workdir") for word in argv)
    options = _options.parse(argv, None if of_a_run else DEFAULT, EXTRA, in_bucket=True)
    if options.workdir and options.config:
        raise UserError("--workdir and --config given: a run has a config of its own. Give one of them.")
    if options.workdir:
        from deepseek_jax.weights import open_weights

        config = open_weights(options.workdir).config
        origin = f"{config.name} ({options.workdir})"
    else:
        config = run_config.validate(options.config)
        origin = config.name
    if options.show_config:
        print("\n".join(run_config.assignments(config)))
        return 0
    from deepseek_jax.abstract_model import abstract_weights
    from deepseek_jax.convert.fp8_weights import bytes_to_serve
    from deepseek_jax.parallel.mesh import sizes

    mesh = sizes(**config.mesh, n_devices=options.devices)
    weights, totals = inspect(config, mesh)
    shown = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if axis not in ("pipe", "context") or n > 1)
    print(f"{origin}: family {config.family}, mesh {shown} ({math.prod(mesh.values()):,} devices)\n")
    if options.workdir or config.run.init_from:
        print("\n".join([*numbers(config), ""]))
    print_table(HEADER, [cells(weight) for weight in weights], right=RIGHT)
    print()
    print_table(("total", "parameters"), totals, right=("parameters",))
    print(f"\non each device: {on_each_device(weights)}")
    wide, in_fp8 = (binary(n_bytes) for n_bytes in bytes_to_serve(abstract_weights(config)))
    print(f"to generate, all of them: {wide} in bfloat16, {in_fp8} as FP8 releases store them")
    if options.workdir:
        from deepseek_jax.train import ledger, mirror

        file = mirror.fetched(options.workdir, ledger.FILE)
        if file and (found := ledger.account(ledger.read(file.parent))):
            print(found)
    return 0


def on_each_device(weights: list[Weight]) -> str:
    """The sums of the bytes; the float32 weights are named only where a step reads others."""
    parts = {"weights": "weight_bytes", "their float32 masters": "master_bytes", "optimizer state": "optimizer_bytes"}
    sums = {name: sum(getattr(weight, field) for weight in weights) for name, field in parts.items()}
    return ", ".join(f"{name} {binary(n_bytes)}" for name, n_bytes in sums.items() if n_bytes)


def numbers(config: ConfigDict) -> list[str]:
    """The keys that make another config one of the same model, as they would be written in it."""
    keys = ("config.family ", "config.model.", "config.data.tokenizer ")
    return [line for line in run_config.assignments(config) if line.startswith(keys)]


def inspect(config: ConfigDict, sizes: dict[str, int]) -> tuple[list[Weight], list[tuple[str, str]]]:
    """The weights of a config's model on a mesh of these sizes, and the rows of the totals, from shapes alone."""
    import jax
    from jax.sharding import AbstractMesh

    from deepseek_jax.abstract_model import AHEAD, abstract, abstract_module, count_parameters
    from deepseek_jax.abstract_model import module as model_of
    from deepseek_jax.layers import lora
    from deepseek_jax.layers.base import BY_ADAMW, dtype_read, logical_axes, roles, split
    from deepseek_jax.parallel.mesh import ALL
    from deepseek_jax.parallel.sharding import bytes_per_device, placements
    from deepseek_jax.precision.policy import policy
    from deepseek_jax.run import network_of, pipeline
    from deepseek_jax.tree import dotted, size
    from deepseek_jax.weights import lora_of

    adapters = lora_of(config)
    module: Any = abstract_module(config)
    if adapters:
        module = abstract(lambda rngs: lora.attach(model_of(config, rngs.params()), adapters, rngs=rngs))
    _, params, router_bias = split(module)
    axes, bias_axes = logical_axes(module)
    sizes = {axis: sizes.get(axis, 1) for axis in ALL}
    mesh = AbstractMesh(tuple(sizes.values()), ALL)
    main_count, ahead_count = count_parameters(params)
    n_biases = count_biases(router_bias)
    parts = [(name, size(part)) for name, part in params.items() if name != AHEAD]
    if sizes["pipe"] > 1:
        layout = pipeline(config, network_of(config)).layout(module, sizes["pipe"], config.pipeline.micro_batches)
        params, router_bias = (jax.eval_shape(layout.staged, tree) for tree in (params, router_bias))
    places = placements(axes, params, config.sharding.to_dict(), mesh)
    bias_places = placements(bias_axes, router_bias, {}, mesh)
    precision = policy(config.precision, config.fp8)

    def weight(path: tuple, array: jax.ShapeDtypeStruct, logical: tuple, place: "Placement", role: str) -> Weight:
        dtype = dtype_read(role, precision.weights, precision.compute)
        read = array if place.is_sharded else array.update(dtype=dtype)
        moment = array.update(dtype=config.optimizer.moments_dtype)
        n_moments = 1 if config.optimizer.method == "muon" and role not in BY_ADAMW else 2
        is_trained = not adapters or lora.is_adapter(tuple(key.key for key in path))
        return Weight(
            *(dotted(path), array.shape, str(read.dtype), logical, tuple(place.spec)),
            weight_bytes=bytes_per_device(read, place.spec, mesh),
            master_bytes=0 if place.reads_master(dtype) else bytes_per_device(array, place.state_spec, mesh),
            optimizer_bytes=n_moments * is_trained * bytes_per_device(moment, place.state_spec, mesh),
        )

    def bias(path: tuple, array: jax.ShapeDtypeStruct, logical: tuple, place: "Placement") -> Weight:
        n_bytes = bytes_per_device(array, place.spec, mesh)
        return Weight(dotted(path), array.shape, str(array.dtype), logical, tuple(place.spec), n_bytes, 0, 0)

    trees = jax.tree_util.tree_map_with_path(weight, params, axes, places, roles(module))
    biases = jax.tree_util.tree_map_with_path(bias, router_bias, bias_axes, bias_places)
    rows = [row for tree in (trees, biases) for row in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Weight))]
    totals = [(f"  {name}", f"{count:,}") for name, count in parts]
    totals += [("main model", millions(main_count)), ("multi-token prediction", millions(ahead_count))]
    return rows, [*totals, ("router biases", f"{n_biases:,}"), *adapter_totals(params, adapters)]


def count_biases(router_bias: dict) -> int:
    """Returns how many numbers bias routers; tables of experts by token id are none."""
    import jax
    import jax.numpy as jnp

    from deepseek_jax.tree import size

    return size([x for x in jax.tree.leaves(router_bias) if jnp.issubdtype(x.dtype, jnp.floating)])


def adapter_totals(params: dict, adapters: Any) -> list[tuple[str, str]]:
    """Returns the row of the parameters that belong to adapters; none where there are no adapters."""
    import jax

    from deepseek_jax.layers import lora

    if not adapters:
        return []
    found = jax.tree_util.tree_leaves_with_path(params)
    n_own = sum(leaf.size for path, leaf in found if lora.is_adapter(tuple(key.key for key in path)))
    return [(f"adapters of rank {adapters.rank}, in these; they alone are trained", millions(n_own))]


def millions(count: int) -> str:
    """A count to the last digit, and in millions."""
    return f"{count:,} ({count / 1e6:,.{0 if count > 1e9 else 2}f}M)"


def cells(weight: Weight) -> tuple[str, ...]:
    """A row as text; axes and split stand in the same order as the shape."""
    shape = "x".join(map(str, weight.shape))
    split_over = ",".join(axis or "-" for axis in weight.spec)
    sizes = (binary(n) if n else "-" for n in (weight.weight_bytes, weight.master_bytes, weight.optimizer_bytes))
    return (weight.name, shape, weight.dtype, ",".join(axis or "-" for axis in weight.axes), split_over, *sizes)

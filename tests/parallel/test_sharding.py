"""Where weights live, and what is said of a mesh that they cannot live on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn.initializers import normal
from jax.sharding import PartitionSpec as P

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Execution, bind, param, run_stack, split, stack
from deepseek_jax.parallel.mesh import REPLICATED, make_mesh, per_device
from deepseek_jax.parallel.sharding import bytes_per_device, expert_axis, placements, state_specs, unsharder

AXES = {"gain": ("embed",), "experts": ("layers", "experts", "embed", "mlp"), "odd": (None,)}
SHAPES = {"gain": (16,), "experts": (2, 8, 16, 6), "odd": (3,)}


def places(rules: dict, data: int = 2, expert: int = 4, shapes: dict = SHAPES) -> dict:
    mesh = make_mesh(data, expert, jax.devices()[: data * expert])
    return placements(AXES, {k: jax.ShapeDtypeStruct(v, jnp.float32) for k, v in shapes.items()}, rules, mesh)


def test_experts_are_shared_out_and_moments_cut_over_the_copies():
    place = places({"experts": "expert"})
    assert place["experts"].spec == P(None, "expert", None, None)
    assert place["experts"].copies == ("data",)
    assert place["experts"].zero_dim == 0  # stacked axes come first: matrices stay whole
    assert place["experts"].state_spec == P(("data",), "expert", None, None)
    assert place["gain"].spec == P(None)
    assert place["gain"].state_spec == P(("data", "expert"))
    assert place["odd"].zero_dim is None and place["odd"].state_spec == P(None)


def test_stacked_axes_are_cut_before_matrices():
    def zero_dim(**shapes: tuple) -> int | None:
        return places({}, shapes=SHAPES | shapes)["experts"].zero_dim

    assert zero_dim(experts=(8, 16, 64, 32)) == 1  # the larger of the stacks
    assert zero_dim(experts=(8, 12, 64, 32)) == 0  # the one that divides by eight devices
    assert zero_dim(experts=(5, 12, 32, 64)) == 3  # none does: the larger side of the matrices
    assert zero_dim(experts=(5, 3, 7, 9)) is None


def test_an_optimizer_s_state_lives_where_its_weights_do():
    place = places({"experts": "expert"})
    array = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in SHAPES.items()}
    scalar = jax.ShapeDtypeStruct((), jnp.int32)
    state = {"count": scalar, "mu": array, "momentum": {"gain": array["gain"]}, "rows": {"odd": scalar}}
    specs = state_specs(state, array, place)
    assert specs["mu"] == {name: place[name].state_spec for name in SHAPES}
    assert specs["momentum"] == {"gain": place["gain"].state_spec}
    assert specs["count"] == specs["rows"]["odd"] == P()
    with pytest.raises(ValueError, match=r"optimizer state rows.gain \(5,\): expected a scalar, or the shape of that"):
        state_specs({"rows": {"gain": jax.ShapeDtypeStruct((5,), jnp.float32)}}, array, place)


def test_fsdp_splits_storage_over_data():
    place = places({"experts": "expert", "embed": "data"})
    assert place["experts"].spec == P(None, "expert", "data", None)
    assert place["experts"].copies == () and place["experts"].zero_dim is None
    assert place["gain"].spec == P("data") and place["gain"].copies == ("expert",)
    assert place["gain"].zero_dim is None


def test_one_device_needs_no_rules():
    for place in places({"experts": "expert", "embed": "data"}, 1, 1).values():
        assert not place.copies and set(place.spec) <= {None}


def test_a_weight_that_does_not_divide_is_named():
    message = r"experts: 8 experts over mesh axis 'expert' of size 3: not divisible.*config\.mesh\.expert"
    with pytest.raises(UserError, match=message):
        places({"experts": "expert"}, 1, 3)


def test_two_dimensions_that_want_one_axis_are_named():
    with pytest.raises(UserError, match=r"experts: embed and mlp both want mesh axis 'data'.*config\.sharding"):
        places({"embed": "data", "mlp": "data"})


def test_an_unknown_axis_is_named():
    with pytest.raises(
        UserError, match=r"config\.sharding\.embed='model': no such mesh axis. Choose one of data, context"
    ):
        places({"embed": "model"})


@pytest.mark.parametrize(
    ("rules", "axis"),
    [({"experts": "expert"}, "expert"), ({"experts": ""}, None), ({}, None), ({"experts": "data"}, "data")],
)
def test_the_rules_say_where_experts_are_shared_out(rules, axis):
    assert expert_axis(rules, make_mesh(2, 4)) == axis
    assert expert_axis(rules, make_mesh(1, 1, jax.devices()[:1])) is None


def test_bytes_of_one_device():
    mesh = make_mesh(2, 4)
    array = jax.ShapeDtypeStruct((8, 16, 6), jnp.bfloat16)
    assert bytes_per_device(array, P("expert", "data", None), mesh) == 8 * 16 * 6 * 2 // 8
    assert bytes_per_device(array, P(None, ("data", "expert"), None), mesh) == 8 * 16 * 6 * 2 // 8
    assert bytes_per_device(array, P(), mesh) == 8 * 16 * 6 * 2


def read(role: str) -> type:
    return jnp.float32


class Layer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.weight_DD = param(rngs, (4, 4), ("embed", None), normal(0.5), role="up")

    def __call__(self, x):
        return jnp.tanh(x @ self.weight_DD[...])


class Net(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.blocks = stack(lambda r: Layer(rngs=r), 3, rngs)
        self.end = Layer(rngs=rngs)

    def __call__(self, x, run: Execution):
        x, _ = run_stack(self.blocks, x, run, lambda block, x, _: (block(x), None))
        return self.end(x)


def test_weights_stored_in_shards_are_gathered_layer_by_layer(filled):
    """FSDP: the same output, and each device's gradient of its shard is the sum over the devices."""
    mesh, rules = make_mesh(2, 1, jax.devices()[:2]), {"embed": "data"}
    definition, params, _ = filled(lambda: Net(rngs=nnx.Rngs(0)), std=0.5)
    run = Execution(unshard=unsharder(rules, mesh, read))
    x = np.random.default_rng(1).normal(size=(2, 4)).astype(np.float32)

    def loss(params, x, run):
        model = bind(definition, params, {})
        if run.unshard:
            run.unshard(model)
        return jnp.sum(model(x, run) ** 2)

    specs = {"blocks": {"weight_DD": P(None, "data", None)}, "end": {"weight_DD": P("data", None)}}
    sharded = per_device(lambda p, x: jax.grad(loss)(p, x, run), mesh, (specs, REPLICATED), specs)
    expected = jax.jit(lambda p, x: jax.grad(loss)(p, x, Execution()))(params, x)
    got = jax.jit(sharded)(params, x)
    for right, here in zip(jax.tree.leaves(expected), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(here, 2 * right, rtol=1e-5, atol=1e-6)  # both devices had the same input


def test_nothing_to_gather():
    assert unsharder({"experts": "expert"}, make_mesh(2, 4), read) is None
    assert unsharder({"embed": "data"}, make_mesh(1, 2), read) is None
    assert split(nnx.eval_shape(lambda: Net(rngs=nnx.Rngs(0))))[1]["blocks"]["weight_DD"].shape == (3, 4, 4)

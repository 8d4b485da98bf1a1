"""Laws of checkpoints: what comes back is bit for bit what was saved, on any mesh, or the reader learns why not."""

import json
import os
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from deepseek_jax.errors import UserError
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer


def mesh_of(*shape):
    names, types = ("data", "expert")[: len(shape)], (AxisType.Auto,) * len(shape)
    return jax.make_mesh(shape, names, devices=jax.devices()[: np.prod(shape)], axis_types=types)


def make_state(seed: int = 0, mesh=None) -> dict:
    """A state with every kind of leaf a run has: fp32, bf16, fp8, int32 scalars, uint32 key data, an empty dict."""
    rng = np.random.default_rng(seed)
    state = {
        "params": {
            "blocks": {"up_LDF": jax.device_put(np.asarray(rng.normal(size=(2, 16, 8)), jnp.bfloat16))},
            "head_DV": jax.device_put(np.asarray(rng.normal(size=(16, 8)), jnp.float32)),
            "fp8_DF": jax.device_put(np.asarray(rng.normal(size=(16, 16)), jnp.float8_e4m3fn)),
        },
        "router_bias": {},
        "optimizer": {"mu": {"head_DV": jnp.full((16, 8), jnp.nan)}},
        "key": jax.device_put(np.asarray(rng.integers(2**32, size=(2,)), jnp.uint32)),
        "step": jnp.int32(seed),
    }
    return jax.device_put(state, shardings_of(state, mesh)) if mesh is not None else state


def shardings_of(state, mesh):
    """The first axis that fits is split over all the mesh's axes."""

    def sharding(leaf):
        fits = [i for i, size in enumerate(leaf.shape) if size % mesh.size == 0]
        spec = [None] * leaf.ndim
        if fits:
            spec[fits[0]] = mesh.axis_names
        return NamedSharding(mesh, PartitionSpec(*spec))

    return jax.tree.map(sharding, state)


def abstract_of(state, mesh=None):
    if mesh is None:
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state)
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings_of(state, mesh)
    )


def assert_same(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for (path, a), b in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(other), strict=True):
        assert a.dtype == b.dtype and a.shape == b.shape, path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path


@pytest.fixture
def told():
    return []


@pytest.fixture
def checkpoints(tmp_path, told):
    with Checkpointer(tmp_path / "run", keep=2, warn=told.append) as checkpointer:
        yield checkpointer


@pytest.mark.parametrize("written, read", [((1,), (8,)), ((8,), (1,)), ((8,), (2, 4)), ((2, 4), (4,))])
def test_any_mesh_reads_what_any_mesh_wrote(checkpoints, told, written, read):
    state = make_state(7, mesh_of(*written))
    checkpoints.save(7, state)
    step, restored, _ = checkpoints.restore(abstract_of(state, mesh_of(*read)))
    assert step == 7 and told == []
    assert_same(state, restored)
    for leaf, sharding in zip(
        jax.tree.leaves(restored), jax.tree.leaves(shardings_of(state, mesh_of(*read))), strict=True
    ):
        assert leaf.sharding == sharding and leaf.committed


def test_without_shardings_everything_lands_on_one_device(checkpoints):
    state = make_state(1, mesh_of(8))
    checkpoints.save(1, state)
    _, restored, _ = checkpoints.restore(abstract_of(state))
    assert_same(state, restored)
    assert {leaf.sharding for leaf in jax.tree.leaves(restored)} == {SingleDeviceSharding(jax.devices()[0])}
    mixed = abstract_of(state) | {"step": abstract_of(state, mesh_of(8))["step"]}
    with pytest.raises(UserError, match="has no sharding"):
        checkpoints.restore(mixed)


def test_restored_arrays_enter_a_donating_step_without_complaint(checkpoints):
    mesh = mesh_of(8)
    state = make_state(1, mesh)
    checkpoints.save(1, state)
    _, restored, _ = checkpoints.restore(abstract_of(state, mesh))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = jax.jit(lambda s: jax.tree.map(lambda x: x, s) | {"step": s["step"] + 1}, donate_argnums=0)(restored)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(restored))
    assert_same(after, state | {"step": state["step"] + 1})


def test_state_donated_right_after_save_is_saved_as_it_was(checkpoints):
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x * 3 + 1, s), donate_argnums=0)
    state = {
        "w": jax.device_put(jnp.arange(1 << 20, dtype=jnp.float32), NamedSharding(mesh_of(8), PartitionSpec("data")))
    }
    expected = {}
    for step in (1, 2):
        expected[step] = jax.tree.map(np.array, state)
        checkpoints.save(step, state)
        for _ in range(4):
            state = advance(state)
    for step in (1, 2):
        _, restored, _ = checkpoints.restore(abstract_of(expected[step]), step=step)
        assert_same(expected[step], restored)


def test_meta_comes_back_and_the_config_is_readable(checkpoints):
    meta = {"config": {"name": "tiny", "train": {"peak": 2.2e-4, "steps": 10}}, "tokens": 2**40, "note": "größer"}
    checkpoints.save(3, make_state(), meta)
    assert checkpoints.wait()
    assert checkpoints.restore(abstract_of(make_state()))[2] == meta
    assert checkpoints.read_meta() == (3, meta)
    assert json.loads((checkpoints.directory / "step_00000003" / "config.json").read_text()) == meta["config"]


def test_shapes_come_from_the_checkpoint_alone(checkpoints):
    state = make_state()
    checkpoints.save(3, state)
    checkpoints.wait()
    step, shapes = Checkpointer(checkpoints.directory, read_only=True).shapes()
    assert step == 3 and shapes["step"] == jax.ShapeDtypeStruct((), jnp.int32)
    assert shapes["params/blocks/up_LDF"] == jax.ShapeDtypeStruct((2, 16, 8), jnp.bfloat16)
    assert len(shapes) == len(jax.tree.leaves(state))


def test_a_part_of_the_tree_can_be_read(checkpoints):
    state = make_state(5)
    checkpoints.save(5, state)
    part = {key: state[key] for key in ("params", "router_bias")}
    _, restored, _ = checkpoints.restore(abstract_of(part, mesh_of(2)), keys=("params", "router_bias"))
    assert_same(part, restored)
    with pytest.raises(UserError, match="'key' is uint32.2. there, expected no such leaf"):
        checkpoints.restore(abstract_of(part))


def change(state, kind):
    if kind == "dtype":
        state["params"]["head_DV"] = state["params"]["head_DV"].astype(jnp.bfloat16)
    if kind == "shape":
        state["params"]["head_DV"] = state["params"]["head_DV"].T
    if kind == "missing":
        state["params"]["more"] = {"gate": jnp.zeros(3)}
    if kind == "extra":
        del state["params"]["head_DV"]
    return state


@pytest.mark.parametrize(
    "kind, words",
    [
        ("dtype", r"'params/head_DV' is float32\[16,8\] there, expected bfloat16\[16,8\]"),
        ("shape", r"'params/head_DV' is float32\[16,8\] there, expected float32\[8,16\]"),
        ("missing", r"'params/more/gate' is absent there, expected float32\[3\]"),
        ("extra", r"'params/head_DV' is float32\[16,8\] there, expected no such leaf"),
    ],
)
def test_a_state_that_differs_is_refused_by_leaf(checkpoints, kind, words):
    checkpoints.save(1, make_state())
    with pytest.raises(UserError, match=words):
        checkpoints.restore(abstract_of(change(make_state(), kind)))


@pytest.mark.parametrize(
    "state, words",
    [
        ({"a": {"b": 3}}, "leaf 'a/b' is a int"),
        ({"a": np.zeros(3)}, "leaf 'a' is a ndarray"),
        ({"a": [jnp.zeros(3)]}, "leaf 'a' is a list"),
        ({"a.b": jnp.zeros(3)}, "entry 'a.b'"),
        ({0: jnp.zeros(3)}, "entry 0"),
        ({"a": jax.random.key}, "leaf 'a' is a function"),
    ],
)
def test_what_is_no_state_is_refused_before_anything_is_written(checkpoints, state, words):
    with pytest.raises(UserError, match=words):
        checkpoints.save(1, state)
    with pytest.raises(UserError, match="random key"):
        checkpoints.save(1, {"key": jax.random.key(0)})
    with pytest.raises(UserError, match="JSON"):
        checkpoints.save(1, make_state(), {"what": object()})
    with pytest.raises(UserError, match="step -1"):
        checkpoints.save(-1, make_state())
    assert os.listdir(checkpoints.directory) == [".writer"]


def test_the_newest_committed_steps_are_kept(checkpoints, told):
    for step in (10, 20, 30):
        checkpoints.save(step, make_state(step))
    checkpoints.wait()
    assert checkpoints.steps() == [20, 30] and checkpoints.latest() == 30 and told == []
    assert sorted(os.listdir(checkpoints.directory)) == [".writer", "shards", "step_00000020", "step_00000030"]
    assert sorted(os.listdir(checkpoints.directory / "shards")) == ["step_00000020", "step_00000030"]


def test_unfinished_steps_are_neither_used_nor_counted_and_go_at_the_next_save(checkpoints, told):
    checkpoints.save(10, make_state(10))
    checkpoints.wait()
    for step in (5, 40):
        path = checkpoints.directory / f"step_{step:08d}" / "arrays.orbax-checkpoint-tmp"
        path.mkdir(parents=True)
        (path / "half").write_bytes(b"x" * 100)
    assert checkpoints.latest() == 10
    assert checkpoints.restore(abstract_of(make_state()))[0] == 10
    assert told == ["step 40 was never finished (it has no COMMIT); it is ignored."]
    checkpoints.save(20, make_state(20))
    checkpoints.wait()
    assert sorted(os.listdir(checkpoints.directory)) == [".writer", "shards", "step_00000010", "step_00000020"]


def test_saving_a_committed_step_again_does_nothing_and_says_so(checkpoints, told):
    checkpoints.save(10, make_state(1))
    checkpoints.save(10, make_state(2))
    assert checkpoints.wait() and told == ["step 10 is saved already; nothing was written."]
    assert_same(checkpoints.restore(abstract_of(make_state()))[1], make_state(1))
    with pytest.raises(UserError, match=r"already holds steps \[10\], newer than 5"):
        checkpoints.save(5, make_state(1))


def test_going_back_replaces_the_path_that_was_left(tmp_path, told):
    with Checkpointer(tmp_path, warn=told.append) as first:
        for step in (10, 20, 30):
            first.save(step, make_state(step))
    with Checkpointer(tmp_path, warn=told.append) as second:
        second.restore(abstract_of(make_state()), step=10)
        second.save(20, make_state(21))
        second.wait()
        assert second.steps() == [10, 20]
        assert told == ["step 30 is deleted: the run went back to step 10 and passed by anew."]
        assert_same(second.restore(abstract_of(make_state()))[1], make_state(21))


def test_one_writer_many_readers(checkpoints):
    checkpoints.save(1, make_state(1))
    checkpoints.wait()
    with pytest.raises(UserError, match=f"another run .pid {os.getpid()} on "):
        Checkpointer(checkpoints.directory)
    reader = Checkpointer(checkpoints.directory, read_only=True)
    assert reader.restore(abstract_of(make_state()))[0] == 1
    with pytest.raises(UserError, match="read only"):
        reader.save(2, make_state(2))
    checkpoints.close()
    Checkpointer(checkpoints.directory).close()


def test_a_forked_child_does_not_keep_the_lock(tmp_path):
    first = Checkpointer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # forking beside JAX's threads; the child only looks
        child = os.fork()
    if not child:
        os._exit(0 if first._lock._file.closed else 1)
    assert os.waitpid(child, 0)[1] == 0
    with pytest.raises(UserError, match="another run"):
        Checkpointer(tmp_path)
    first.close()


def test_nothing_there_and_wrong_places_are_user_errors(tmp_path):
    assert Checkpointer(tmp_path / "none", read_only=True).latest() is None
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match="no checkpoint in"):
        Checkpointer(tmp_path, read_only=True).restore({})
    with pytest.raises(UserError, match="mounted file system"):
        Checkpointer("hdfs://host/run")
    with pytest.raises(UserError, match="checkpoint.keep is 0"):
        Checkpointer(tmp_path, keep=0)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write checkpoints"):
        Checkpointer(tmp_path / "file")
    with Checkpointer(tmp_path) as checkpoints:
        checkpoints.save(3, make_state())
        checkpoints.wait()
        with pytest.raises(UserError, match=r"no checkpoint of step 4 .* holds steps \[3\]"):
            checkpoints.restore(abstract_of(make_state()), step=4)


def test_saving_is_silent(tmp_path, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with Checkpointer(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(1, mesh_of(8)))
            checkpoints.restore(abstract_of(make_state(), mesh_of(2)))
    assert capfd.readouterr() == ("", "")

"""The mesh and who holds which rows of a batch."""

import jax
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import (
    ALL,
    BATCH,
    REPLICATED,
    global_batch,
    make_mesh,
    per_device,
    place,
    size,
    sizes,
    total,
)


def test_sizes():
    mesh = make_mesh(2, 4)
    assert dict(mesh.shape) == {"pipe": 1, "data": 2, "context": 1, "expert": 4}
    assert size(mesh, ALL) == 8 and size(mesh, ()) == 1
    assert make_mesh(-1, 2).shape["data"] == len(jax.devices()) // 2
    assert make_mesh(1, 2).size == 2


@pytest.mark.parametrize(
    ("data", "expert", "message"),
    [
        (-1, 3, "data=-1 x expert=3 does not divide the 8 devices"),
        (4, 4, "needs 16 devices, here are 8"),
        (-1, 16, "does not divide"),
        (0, 1, "data=0 x expert=1 on 0 devices: expected sizes >= 1"),
        (1, -1, "expected sizes >= 1"),
    ],
)
def test_impossible_meshes_are_explained(data, expert, message):
    with pytest.raises(UserError, match=message):
        make_mesh(data, expert)


def test_each_device_gets_its_rows_in_order():
    mesh = make_mesh(2, 4)
    rows = {"ids": np.arange(16).reshape(16, 1)}
    batch = global_batch(rows, mesh)
    np.testing.assert_array_equal(batch["ids"], rows["ids"])
    by_device = {shard.device: shard.data[:, 0].tolist() for shard in batch["ids"].addressable_shards}
    assert [by_device[device] for device in mesh.devices.flat] == [[2 * i, 2 * i + 1] for i in range(8)]


def test_a_total_is_over_all_devices():
    mesh = make_mesh(2, 4)
    run = jax.jit(per_device(lambda x: total(x.sum()), mesh, (BATCH,), REPLICATED))
    assert float(run(place(np.arange(8.0)[:, None], mesh, BATCH))) == 28


@pytest.mark.parametrize(
    ("pipe", "data", "expert", "n_devices", "expected"),
    [(1, -1, 1, 0, 1), (1, -1, 64, 0, 1), (1, -1, 64, 256, 4), (1, 2, 4, 0, 2), (1, 2, 4, 8, 2), (16, -1, 64, 2048, 2)],
)
def test_sizes_of_a_mesh_elsewhere(pipe, data, expert, n_devices, expected):
    assert sizes(pipe, data, expert, n_devices) == {"pipe": pipe, "data": expected, "context": 1, "expert": expert}


@pytest.mark.parametrize(
    ("data", "expert", "n_devices"), [(-1, 48, 256), (2, 4, 16), (0, 1, 0), (1, 0, 0), (-1, 8, 4), (1, 1, -1)]
)
def test_a_mesh_that_cannot_be_is_refused(data, expert, n_devices):
    with pytest.raises(UserError, match="config.mesh"):
        sizes(1, data, expert, n_devices)

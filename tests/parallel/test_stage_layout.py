"""Layers in slots along a pipeline: nothing is lost on the way there and back, and every stage finds its own layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.mesh import PIPE, make_mesh, per_device
from deepseek_jax.parallel.stage_layout import make_layout

STACKS = {"dense": 2, "moe": 9}
RANKS, MICRO = 4, 8
SCHEDULES = ("1f1b", "dualpipe", "dualpipev")


@pytest.fixture(scope="module", params=SCHEDULES)
def layout(request):
    return make_layout(request.param, RANKS, MICRO, STACKS)


@pytest.fixture(scope="module")
def stacks() -> dict:
    """Each layer is its number, from 1 on."""
    return {name: jnp.arange(1.0, n + 1) for name, n in STACKS.items()}


def test_stacks_come_back_as_they_were(layout, stacks):
    jax.tree.map(np.testing.assert_array_equal, layout.unstaged(layout.staged(stacks)), stacks)


def test_chunks_share_the_slots_of_a_stack_that_no_rank_has_in_two(layout, stacks):
    """The dense layers are in the first stage: one set of slots per rank, however many stages a rank has."""
    held = (layout.layers("moe") >= 0).any(axis=2).sum(axis=1)
    assert layout.is_shared("dense") and layout.is_shared("moe") == (held.max() == 1)
    assert len(layout.staged(stacks)["dense"]) == RANKS * layout.slots("dense")


def test_every_stage_finds_its_layers_and_gradients_return_to_them(layout, stacks):
    mesh = make_mesh(1, 1, jax.devices()[:RANKS], RANKS)

    def on_device(staged: dict) -> tuple[list[dict], dict]:
        chunks, rank = layout.chunks(staged), jax.lax.axis_index(PIPE)

        def gradient(name: str, chunk: int) -> jax.Array:
            """The number of each layer where this stage has one."""
            return jnp.where(jnp.asarray(layout.layers(name) >= 0)[rank, chunk], chunks[chunk][name], 0)

        return chunks, layout.joined([{name: gradient(name, c) for name in STACKS} for c in range(layout.n_chunks)])

    chunks, gradients = jax.jit(per_device(on_device, mesh, P(PIPE), P(PIPE)))(layout.staged(stacks))
    for name, n in STACKS.items():
        for chunk in range(layout.n_chunks):
            numbers = layout.layers(name)[:, chunk].ravel()
            np.testing.assert_array_equal(np.asarray(chunks[chunk][name])[numbers >= 0], numbers[numbers >= 0] + 1)
        np.testing.assert_array_equal(layout.unstaged(gradients)[name], layout.copies * np.arange(1, n + 1))


def test_slots_of_a_stack_apart_come_together_in_order(layout):
    """There are more of them than one digit numbers: keys of a tree are sorted as text wherever jax takes it apart."""
    stage = {
        "moe": {"w": jnp.arange(24.0).reshape(12, 2), "codes": (jnp.arange(12), jnp.arange(12))},
        "gain": jnp.ones(3),
    }
    slots = jax.tree.map(lambda a: a, layout.apart(stage))
    assert slots["moe"]["11"]["w"].tolist() == [22, 23] and slots["gain"].shape == (3,)
    jax.tree.map(np.testing.assert_array_equal, layout.together(slots), stage)

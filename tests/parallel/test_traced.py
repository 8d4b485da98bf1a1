"""What a traced program sends, by hand: kinds, axes, turns of loops, branches, bytes; and what its loop carries."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec as P

from deepseek_jax.parallel.mesh import make_mesh, per_device
from deepseek_jax.parallel.traced import Sent, Switches, carried, collectives

SIZES = {"pipe": 2, "data": 1, "expert": 4}
ROWS, WIDTH = 8, 4
BYTES = ROWS * WIDTH * 4  # of one device's float32 part


def traced(function):
    mesh = make_mesh(1, 4, pipe=2)
    x = jax.ShapeDtypeStruct((SIZES["pipe"] * SIZES["expert"] * ROWS, WIDTH), jnp.float32)
    spec = P(("pipe", "data", "expert"))
    return jax.make_jaxpr(per_device(function, mesh, spec, spec))(x)


def exchange(x):
    return jax.lax.all_to_all(x, "expert", 0, 0, tiled=True)


def shift(x):
    return jax.lax.ppermute(x, "pipe", [(0, 1)])


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (exchange, Sent("all_to_all", ("expert",), 1, 1, BYTES * 3 / 4)),
        (shift, Sent("ppermute", ("pipe",), 1, 1, BYTES)),
        (lambda x: x + jax.lax.psum(x, ("pipe", "expert")), Sent("psum", ("pipe", "expert"), 1, 1, BYTES * 2 * 7 / 8)),
        (lambda x: jax.lax.all_gather(x, "expert")[0], Sent("all_gather", ("expert",), 1, 1, BYTES * 3)),
        (
            lambda x: jnp.tile(jax.lax.psum_scatter(x, "expert", tiled=True), (4, 1)),
            Sent("reduce_scatter", ("expert",), 1, 1, BYTES * 3 / 4),
        ),
    ],
)
def test_bytes_of_each_kind(function, expected):
    assert collectives(traced(function), SIZES) == [expected]


def test_an_axis_of_one_device_sends_nothing():
    assert collectives(traced(lambda x: jax.lax.psum(x, "data")), SIZES) == []


def test_a_loop_multiplies_and_what_it_carries_is_counted():
    program = traced(lambda x: jax.lax.scan(lambda x, _: (exchange(x), None), x, None, length=5)[0])
    assert collectives(program, SIZES) == [Sent("all_to_all", ("expert",), 1, 5, 5 * BYTES * 3 / 4)]
    assert carried(program, 5) == BYTES and carried(program, 6) == 0


def test_a_switch_in_the_loop_over_ticks_runs_as_told():
    """Five ticks: twice nothing, three times an exchange; outside such a loop the first branch counts."""
    choice = jnp.asarray([1, 0, 1, 0, 1])

    def ticks(x):
        return jax.lax.scan(lambda x, i: (shift(jax.lax.switch(i, [jnp.copy, exchange], x)), None), x, choice)[0]

    sent = {row.kind: row.per_step for row in collectives(traced(ticks), SIZES, Switches(5, [[2, 3]]))}
    assert sent == {"all_to_all": 3, "ppermute": 5}
    sent = {row.kind: row.per_step for row in collectives(traced(ticks), SIZES)}
    assert sent == {"all_to_all": 0, "ppermute": 5}


def test_a_loop_of_unknown_length_is_refused():
    program = traced(lambda x: jax.lax.while_loop(lambda x: jnp.sum(x) > 0, exchange, x))
    with pytest.raises(ValueError, match="all_to_all in a loop of unknown length"):
        collectives(program, SIZES)

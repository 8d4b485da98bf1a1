"""Every schedule on three meshes of eight devices trains one device's model: losses, every gradient, five whole steps.

The model has all that makes pipelines hard: a dense first layer, routers with biases, multi-token prediction, and
layers that do not divide by the stages. In float64 (all that is float32 elsewhere is float64 here, masters and sums
too) nothing but the order of sums differs. Compiling thirty pipelines takes long, so plain pytest leaves these out:

    pytest -m matrix -n0 -s         # prints the largest differences of each
"""

from collections.abc import Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.models import family
from deepseek_jax.parallel.mesh import global_batch
from deepseek_jax.parallel.schedule import SCHEDULES
from tests.train.test_pipelined import trainer
from tests.train.test_step import batch, leaves

STEPS = 5
MESHES = {"pipe 4 x expert 2": (4, 1, 2, 8), "pipe 2 x data 2 x expert 2": (2, 2, 2, 4), "pipe 8": (8, 1, 1, 16)}


class Bounds(NamedTuple):
    """Largest differences, relative to the largest number of an array."""

    loss: float
    gradient: float
    weights: float  # after all steps: Adam divides by the gradient's size, and so makes rounding larger


BOUNDS = {"float64": Bounds(1e-12, 1e-10, 1e-6), "float32": Bounds(1e-5, 1e-5, 1e-2)}


@pytest.fixture(scope="module", params=BOUNDS)
def dtype(request) -> Iterator[str]:
    """The format of weights, activations and sums."""
    with jax.enable_x64(request.param == "float64"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "float32", getattr(jnp, request.param))
        yield request.param


class Run(NamedTuple):
    """Reports of all steps, Adam's first moment after the first one, weights after the last."""

    reports: list
    moment: dict
    params: dict


def run(sizes, weights: tuple, dtype: str, *mesh, **options) -> Run:
    subject = trainer(sizes, *mesh, compute=dtype, weights=dtype, moments_dtype=dtype, **options)
    state, reports, moment = subject.init(0, *weights), [], {}
    for step in range(STEPS):
        given = batch(step)
        given = given._replace(weights_BT=given.weights_BT.astype(dtype))
        state, report = subject.step(state, global_batch(given, subject.mesh))
        reports.append(jax.device_get(report))
        moment = moment or jax.device_get(subject.store(state)["optimizer"]["mu"])
    return Run(reports, moment, jax.device_get(subject.store(state)["params"]))


def n_layers(pipe: int, schedule: str) -> int:
    """One or two more than there are stages, so that they do not divide."""
    n_stages = pipe * (2 if schedule == "dualpipev" else 1)
    return {2: 5, 4: 9 if pipe == 4 else 5, 8: 9, 16: 17}[n_stages]


@pytest.fixture(scope="module")
def known(tiny_sizes, filled, dtype):
    """A function from a number of layers to (sizes, weights, one device's run), each made once."""
    made: dict[int, tuple] = {}

    def of(layers: int) -> tuple:
        if layers not in made:
            numbers = tiny_sizes.copy_and_resolve_references()
            numbers.update(n_layers=layers)
            sizes = family("v3").Config.from_config(numbers)
            weights = filled(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0)), std=0.1)[1:]
            weights = jax.tree.map(lambda a: np.asarray(a, dtype), weights)
            made[layers] = sizes, weights, run(sizes, weights, dtype, 1, 1, 1)
        return made[layers]

    return of


def largest_difference(found: dict, known: dict) -> tuple[float, str]:
    """Of all arrays of a tree, relative to the largest number of the array; and where it is."""
    pairs = zip(leaves(found), leaves(known), strict=True)
    return max((np.abs(a - b).max() / np.abs(b).max(), path) for (path, a), (_, b) in pairs if np.abs(b).max() > 0)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.timeout(3600)
@pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types")  # of integers, which float64 widens
@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_five_steps_are_those_of_one_device(known, dtype, mesh, schedule):
    *shape, n_micro = MESHES[mesh]
    sizes, weights, one = known(n_layers(shape[0], schedule))
    found = run(sizes, weights, dtype, *shape, schedule, n_micro)
    loss = max(abs(a.loss / b.loss - 1) for a, b in zip(found.reports, one.reports, strict=True))
    gradient, after = largest_difference(found.moment, one.moment), largest_difference(found.params, one.params)
    print(
        f"{dtype}, {mesh}, {schedule}, {sizes.n_layers} layers: loss {loss:.1e}, gradient {gradient[0]:.1e} "
        f"({gradient[1]}), weights after {STEPS} steps {after[0]:.1e}"
    )
    for a, b in zip(found.reports, one.reports, strict=True):
        jax.tree.map(np.testing.assert_array_equal, a.loads, b.loads)
        assert a.finite == 1
    bounds = BOUNDS[dtype]
    assert loss <= bounds.loss and gradient[0] <= bounds.gradient and after[0] <= bounds.weights

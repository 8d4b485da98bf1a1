"""Sequences divided over devices in whole steps, in float64: nothing but the order of sums differs from one device.

As in `test_pipeline_matrix.py`, all that is float32 elsewhere is float64 here, masters and sums too. Beside the axis
`data`, in FP8: `test_fp8_steps.py`; a run that moves to divided sequences and back: `test_run.py`.
"""

from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.models import family
from deepseek_jax.parallel.context import CONTEXT
from deepseek_jax.parallel.mesh import global_batch
from tests.train.test_step import ADAMW, EXPERTS, V, adamw, batch, leaves, trainer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("any_load"),
    pytest.mark.filterwarnings("ignore:scatter inputs have incompatible types"),  # of integers, which float64 widens
]
STEPS = 3


@pytest.fixture(scope="module", autouse=True)
def wide() -> Iterator[None]:
    with jax.enable_x64(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(jnp, "float32", jnp.float64)
        yield


@pytest.fixture(scope="module")
def weights(tiny_sizes, filled) -> tuple:
    """(sizes, params and router biases)"""
    numbers = tiny_sizes.copy_and_resolve_references()
    numbers.update(n_layers=2, n_dense_layers=0)  # attention, which alone reads other tokens, is the same in all blocks
    sizes = family("v3").Config.from_config(numbers)
    made = filled(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0)), std=0.1)[1:]
    return sizes, jax.tree.map(lambda a: np.asarray(a, np.float64), made)


def made(weights: tuple, *mesh, rules=None, **options):
    wide = {"compute": jnp.float64, "weights": jnp.float64}
    optimizer = adamw(**ADAMW | {"moments_dtype": "float64"})
    return trainer(weights[0], *mesh, EXPERTS | (rules or {}), optimizer=optimizer, **wide, **options)


def text(step: int, mesh) -> tuple:
    given = batch(step)
    return global_batch(given._replace(weights_BT=given.weights_BT.astype(np.float64)), mesh)


def steps(subject, state, first: int = 0, n: int = STEPS) -> list[tuple]:
    """(state on the host, report) of each step."""
    found = []
    for step in range(first, first + n):
        state, report = subject.step(state, text(step, subject.mesh))
        found.append(jax.device_get((state, report)))
    return found


@pytest.fixture(scope="module")
def whole(weights) -> tuple:
    """One device: (trainer, its steps)."""
    subject = made(weights, 1, 1)
    return subject, steps(subject, subject.init(0, *weights[1]))


@pytest.fixture(scope="module")
def divided(weights) -> tuple:
    """Eight chunks over four devices, which also keep weights in shards; blocks recomputed, experts over two."""
    subject = made(weights, 1, 2, rules={"embed": CONTEXT}, context=4, remat="block")
    return subject, steps(subject, subject.init(0, *weights[1]))


def assert_same(found: list, known: list, tolerance: float) -> None:
    for (state, report), (known_state, known_report) in zip(found, known, strict=True):
        for field in ("loss", "main", "mtp", "gradient_norm"):
            assert getattr(report, field) == pytest.approx(getattr(known_report, field), rel=1e-11), field
        assert report.checksum == known_report.checksum and report.finite == 1
        jax.tree.map(np.testing.assert_array_equal, report.loads, known_report.loads)
        for (path, one), (_, right) in zip(leaves(state), leaves(known_state), strict=True):
            assert np.abs(one - right).max() <= tolerance * np.abs(right).max(), path


def test_steps_are_those_of_one_device(whole, divided):
    """Weights and moments after each: the first moment after the first is its gradient, but for a factor."""
    subject, found = divided
    table = subject.placements["embedding"]["table_VD"]
    assert CONTEXT in table.spec and table.is_sharded
    mu, right = (run[0][0]["optimizer"]["mu"] for run in (found, whole[1]))
    for (path, one), (_, other) in zip(leaves(mu), leaves(right), strict=True):
        assert np.linalg.norm(one - other) <= 1e-12 * np.linalg.norm(other), path
    assert_same(found, whole[1], 1e-7)  # Adam divides by the gradient's size, and so makes rounding larger


def test_a_state_resumes_on_another_number_of_devices(whole, divided):
    """After the first step the state moves: nothing of the axis is in it."""
    for here, there in ((whole, divided), (divided, whole)):
        subject, state = here[0], there[1][0][0]
        state = jax.device_put(state, jax.tree.map(lambda x: x.sharding, subject.abstract))
        assert_same(steps(subject, state, first=1, n=STEPS - 1), there[1][1:], 1e-7)


def test_held_out_text_has_the_same_loss(whole, divided, weights):
    lengths = jnp.arange(V) % 3
    found, known = (one.evaluator(lengths)(one.init(0, *weights[1]), text(9, one.mesh)) for one, _ in (divided, whole))
    np.testing.assert_allclose(found, known, rtol=1e-12)
    assert found.nats > 0

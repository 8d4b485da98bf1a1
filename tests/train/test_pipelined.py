"""A whole V3 in a pipeline trains as on one device: steps, loads, biases, evaluation, checkpoints, in any schedule."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.models import family
from deepseek_jax.parallel import alltoall
from deepseek_jax.parallel.homes import make_homes
from deepseek_jax.parallel.lint import check_collectives
from deepseek_jax.parallel.mesh import global_batch, make_mesh
from deepseek_jax.train import pipelined
from deepseek_jax.train.optimizers import adamw
from deepseek_jax.train.pipelined import Pipeline
from deepseek_jax.train.step import Trainer
from tests.train.test_step import ADAMW, EXPERTS, OBJECTIVE, STEP, B, V, arguments_of, batch, leaves

pytestmark = [  # pipelines compile for long; parallel/test_pipeline.py has short cases
    pytest.mark.slow,
    pytest.mark.usefixtures("any_load"),
]
STEPS = 2


@pytest.fixture(scope="module")
def sizes(tiny_sizes):
    """A dense layer and two with experts: stages hold different numbers of each."""
    return family("v3").Config.from_config(tiny_sizes)


def smaller(tiny_sizes, filled, **numbers) -> tuple:
    """(sizes, weights) with a layer for each of two stages, nothing else unless it is said."""
    sizes = tiny_sizes.copy_and_resolve_references()
    sizes.update({"n_layers": 2, "mtp_depth": 0} | numbers)
    small = family("v3").Config.from_config(sizes)
    return small, jax.tree.map(np.asarray, filled(lambda: family("v3").Model(small, rngs=nnx.Rngs(0)), std=0.1)[1:])


@pytest.fixture(scope="module")
def weights(sizes, filled) -> tuple:
    return jax.tree.map(np.asarray, filled(lambda: family("v3").Model(sizes, rngs=nnx.Rngs(0)), std=0.1)[1:])


def trainer(sizes, pipe: int, data: int, expert: int, schedule: str = "1f1b", n_micro: int = 1, **options) -> Trainer:
    mesh = make_mesh(data, expert, jax.devices()[: pipe * data * expert], pipe)
    return Trainer(
        lambda run, rngs: family("v3").Model(sizes, run, rngs=rngs),
        mesh,
        EXPERTS | options.pop("rules", {}),
        OBJECTIVE,
        adamw(**ADAMW | {"moments_dtype": options.pop("moments_dtype", "float32")}),
        dataclasses.replace(STEP, micro_batches=n_micro),
        pipeline=Pipeline(schedule, options.pop("end", 0.0), options.pop("overlap", None)),
        **options,
    )


def run(trainer: Trainer, weights: tuple, *, evaluated: bool = True) -> tuple:
    """(states as stored, reports) of the first steps, and an evaluation after them if asked for."""
    state = trainer.init(0, *weights)
    states, reports = [jax.device_get(trainer.store(state))], []
    for step in range(STEPS):
        state, report = trainer.step(state, global_batch(batch(step), trainer.mesh))
        states.append(jax.device_get(trainer.store(state)))
        reports.append(jax.device_get(report))
    if not evaluated:
        return states, reports, None
    evaluation = trainer.evaluator(jnp.arange(V) % 3)(state, global_batch(batch(9), trainer.mesh))
    return states, reports, jax.device_get(evaluation)


@pytest.fixture(scope="module")
def one_device(sizes, weights) -> tuple:
    return run(trainer(sizes, 1, 1, 1), weights)


@pytest.fixture(scope="module")
def two_stages(sizes, weights) -> tuple:
    """(trainer, its run, where weights lie): 1F1B over two ranks, experts over two devices each."""
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pipelined, "make_homes", lambda *given: made.append(make_homes(*given)) or made[-1])
        subject = trainer(sizes, 2, 1, 2, "1f1b", 4)
        return subject, run(subject, weights), made


def check_same(found: tuple, known: tuple) -> None:
    (states, reports, evaluation), (known_states, known_reports, known_evaluation) = found, known
    jax.tree.map(np.testing.assert_array_equal, states[0], known_states[0])
    for a, b in zip(reports, known_reports, strict=True):
        for field in ("loss", "main", "mtp", "gradient_norm", "max_violation"):
            assert getattr(a, field) == pytest.approx(getattr(b, field), rel=1e-5), field
        assert a.checksum == b.checksum
        jax.tree.map(np.testing.assert_array_equal, a.loads, b.loads)
    for (path, b), (_, a) in zip(leaves(known_states[-1]), leaves(states[-1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4, err_msg=path)
    if evaluation is not None:
        np.testing.assert_allclose(evaluation, known_evaluation, rtol=1e-5)


def test_two_stages_train_the_same_model(one_device, two_stages):
    """The first has the dense layer, of which a weight lies in pieces in arrays of the other (`parallel.homes`)."""
    _, found, made = two_stages
    assert found[2] is not None
    check_same(found, one_device)
    assert has_pieces(made)


def has_pieces(made: list) -> bool:
    """Whether a weight lies in several places."""
    return any(len(lie) > 1 for homes in made for places in homes.places.values() for lie in places.values())


@pytest.mark.matrix
def test_dualpipev_in_shards_trains_the_same_model(one_device, sizes, weights):
    """The work of the end leaves the first stage the dense layer alone, which reports no balance loss."""
    subject = trainer(sizes, 2, 2, 1, "dualpipev", 4, rules={"embed": "data"}, end=2.0)
    check_same(run(subject, weights, evaluated=False), one_device)


@pytest.mark.matrix
@pytest.mark.parametrize(
    ("schedule", "overlap"),
    [
        pytest.param("1f1b", True, id="1f1b, one switch"),
        pytest.param("1f1b", False, id="1f1b, three"),
        pytest.param("dualpipe", True, id="dualpipe, one switch"),
    ],
)
def test_a_dense_layer_in_pieces_trains_the_same(tiny_sizes, filled, monkeypatch, schedule, overlap):
    """It is the first stage, wider than the experts of the others, in whose arrays it lies (`parallel.homes`)."""
    made = []
    monkeypatch.setattr(pipelined, "make_homes", lambda *given: made.append(make_homes(*given)) or made[-1])
    wide, weights = smaller(tiny_sizes, filled, n_layers=4, dense_width=160)
    n_micro = 8 if schedule == "dualpipe" else 4
    found = run(trainer(wide, 4, 1, 1, schedule, n_micro, overlap=overlap), weights, evaluated=False)
    assert has_pieces(made)
    check_same(found, run(trainer(wide, 1, 1, 1), weights, evaluated=False))


def test_gradients_of_every_weight(one_device, two_stages):
    """After one step the first moment holds the clipped gradient: equal to one device's in the 5th digit."""
    first = two_stages[1][0][1]["optimizer"]["mu"]
    for (path, known), (_, found) in zip(leaves(one_device[0][1]["optimizer"]["mu"]), leaves(first), strict=True):
        assert np.abs(found - known).max() <= 1e-5 * np.abs(known).max() + 1e-10, path


def test_all_devices_reach_every_collective(two_stages):
    subject = two_stages[0]
    check_collectives(subject.step.trace(*arguments_of(subject)).jaxpr)


def test_a_step_whose_buffers_are_too_small_is_run_again(tiny_sizes, filled, monkeypatch):
    """With the result, bit for bit, of buffers for any load; the next step begins with those that were enough."""
    monkeypatch.setattr(alltoall, "HEADROOM", (0.25, math.inf))
    small, weights = smaller(tiny_sizes, filled, n_dense_layers=0)
    subject = trainer(small, 2, 1, 2)
    tried, refused = subject.step.program(subject.init(0, *weights), global_batch(batch(0), subject.mesh))
    for name, given in subject.init(0, *weights).items():
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(tried[name]), jax.device_get(given))
    assert refused.sent.too_small > 0
    found = run(subject, weights, evaluated=False)
    assert (subject.step.level, subject.step.repeated) == (1, 1)
    known = run(subject, weights, evaluated=False)
    assert (subject.step.level, subject.step.repeated) == (1, 1)
    jax.tree.map(np.testing.assert_array_equal, found, known)


def test_weights_of_a_stage_lie_on_its_rank_alone(two_stages, weights):
    subject = two_stages[0]
    state = subject.init(0, *weights)
    gate = state["params"]["moe_blocks"]["experts"]["gate_XDF"]
    assert gate.shape[0] == 2 and gate.addressable_shards[0].data.shape[0] == gate.shape[0] // 2
    table = state["params"]["embedding"]["table_VD"]  # each rank keeps its ids, each of its devices a part of them
    assert table.addressable_shards[0].data.size * 4 == table.size
    stored = subject.store(state)
    for name, n_held, n_layers in (("dense_blocks", 2, 1), ("moe_blocks", 2, 2)):
        for held, kept in zip(*(jax.tree.leaves(tree["params"][name]) for tree in (state, stored)), strict=True):
            assert (held.shape[0], kept.shape[0]) == (n_held, n_layers)
    jax.tree.map(
        np.testing.assert_array_equal, jax.device_get(subject.load(stored)["params"]), jax.device_get(state["params"])
    )
    assert B % 4 == 0

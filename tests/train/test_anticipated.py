"""Anticipatory routing: experts are those that earlier weights chose; everything else is of the present ones."""

import functools

import jax
import numpy as np
import pytest

from deepseek_jax import run, run_config
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import global_batch, make_mesh
from deepseek_jax.train.anticipated import Routed, ahead, chosen

B, T, E, K = 2, 12, 6, 2
SMALL = {"vocab_size": 64, "d_model": 16, "n_layers": 4, "compress_ratios": (0, 8, 0, 8, 0), "n_hash_layers": 0}
SMALL |= {"n_heads": 2, "q_rank": 8, "head_width": 8, "rope_width": 4, "out_groups": 1, "out_rank": 8, "window": 4}
SMALL |= {"n_streams": 2, "sinkhorn_steps": 2, "n_experts": E, "expert_width": 8, "top_k": K, "mtp_depth": 0}
SMALL |= {"index_width": 8, "init_std": 0.2}


def config_of(name="tiny_v4", **sizes):
    config = run_config.load(name)
    config.model.update(sizes)
    config.data.seq_len, config.batch.size = T, B
    config.optimizer.method, config.optimizer.eps = "adamw", 1e-8
    config.loss.mtp_weight = config.loss.mtp_weight_final = 0.0
    config.loss.auxiliary.update({"index_kl": 0.0} if sizes else {})  # no layer here has an indexer
    config.loop.routing_delay = 1
    return config


def one_device():
    return make_mesh(data=1, devices=jax.devices()[:1])


def batch(seed):
    ids = np.random.default_rng(seed).integers(0, 64, (B, T + 1)).astype(np.int32)
    return Batch.of_windows(ids)


def test_batches_wait_with_the_experts_of_their_time():
    """The number of a step stands for the weights after it; the reader is closed at the end."""
    step, closed = [0], []

    def reader():
        try:
            yield from (Batch(number, *[None] * 4) for number in range(5))
        finally:
            closed.append(True)

    found = []
    for routed in ahead(reader(), 2, lambda _: {"blocks": step[0]}):
        found.append((routed.ids_BT, routed.routes["blocks"]))
        step[0] += 1
    assert found == [(0, 0), (1, 0), (2, 0), (3, 1), (4, 2)] and closed == [True]
    stopped = ahead(reader(), 2, lambda _: {})
    next(stopped)
    stopped.close()
    assert closed == [True, True]


@pytest.fixture(scope="module")
def trained(begun):
    """(trainer, what chooses, two states, the first batch): a V4 whose two kinds of layers repeat twice."""
    trainer = run.trainer(config_of(**SMALL), one_device())
    select = trainer.with_model(functools.partial(chosen, mask=trainer.objective.mask_documents))

    def choose(state, rows):
        return jax.device_get(select(state, rows))  # on the host: the step is compiled for arrays from there

    first, other = (begun(trainer, seed, std=0.2) for seed in (0, 1))
    return trainer, choose, first, other, global_batch(batch(0), trainer.mesh)


@pytest.mark.slow
def test_a_step_visits_the_experts_it_is_given_and_learns_from_them(trained):
    trainer, choose, first, other, rows = trained
    own, given = (choose(state, rows) for state in (first, other))
    assert {name: routes.shape for name, routes in own.items()} == {"blocks_0": (B, T, 4, K)}
    assert np.any(own["blocks_0"] != given["blocks_0"])
    reports = {}
    for name, routes in (("own", own), ("given", given)):
        state = jax.tree.map(lambda x: x.copy(), first)
        reports[name] = jax.device_get(trainer.step(state, Routed(*rows, routes))[1])
    assert reports["own"].main != reports["given"].main and reports["given"].finite
    for routes, report in zip((own, given), reports.values(), strict=True):
        counts = [np.bincount(routes["blocks_0"][:, :, layer].ravel(), minlength=E) for layer in range(4)]
        loads = report.loads["blocks_0"]["blocks"]
        for layer, count in enumerate(counts):  # (one kind, the other) twice
            np.testing.assert_array_equal(loads[str(layer % 2)][layer // 2], count)


@pytest.mark.slow
def test_experts_of_the_present_weights_change_nothing(trained):
    trainer, choose, first, _, rows = trained
    config = config_of(**SMALL)
    config.loop.routing_delay = 0
    plain = run.trainer(config, one_device())
    present = trainer.step(jax.tree.map(lambda x: x.copy(), first), Routed(*rows, choose(first, rows)))[1]
    expected = plain.step(jax.tree.map(lambda x: x.copy(), first), rows)[1]
    for name in ("loss", "main", "gradient_norm"):
        assert float(getattr(present, name)) == pytest.approx(float(getattr(expected, name)), rel=1e-6), name
    jax.tree.map(np.testing.assert_array_equal, present.loads, expected.loads)


@pytest.mark.slow
@pytest.mark.matrix
@pytest.mark.parametrize("axis", ["expert", "context"])
def test_a_mesh_chooses_and_visits_the_same_experts(trained, begun, axis):
    trainer, choose, first, other, rows = trained
    expected = trainer.step(jax.tree.map(lambda x: x.copy(), first), Routed(*rows, choose(other, rows)))[1]
    mesh = make_mesh(data=1, devices=jax.devices()[:2], **{axis: 2})
    divided = run.trainer(config_of(**SMALL), mesh)
    select = divided.with_model(functools.partial(chosen, mask=divided.objective.mask_documents))
    (state, earlier), own = (begun(divided, seed, std=0.2) for seed in (0, 1)), global_batch(batch(0), mesh)
    found = divided.step(state, Routed(*own, select(earlier, own)))[1]
    assert float(found.main) == pytest.approx(float(expected.main), rel=1e-5)
    jax.tree.map(np.testing.assert_array_equal, found.loads, expected.loads)


def test_a_step_alone_is_refused():
    with pytest.raises(UserError, match="routing_delay=1: a step alone has no batches that wait"):
        run.abstract_batch(config_of(), one_device())


def test_what_has_no_experts_to_choose_is_refused():
    with pytest.raises(UserError, match="routing_delay=1: the model of tiny_v1 has no routed experts"):
        config = config_of("tiny_v1")
        run.check_routing(config, one_device(), None)
    with pytest.raises(UserError, match="routing_delay=1: reinforcement learning"):
        run.check_routing(config_of(), one_device(), object())

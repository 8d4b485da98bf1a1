"""What a trainer minimises, by which method, and which weights: each is an argument, made here and not in the package.

One run on two devices has an objective, an optimizer and a mask of its own; numpy and one device repeat its first step.
"""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.nn.initializers import normal

from deepseek_jax.data.pipeline import Batch
from deepseek_jax.layers.base import param
from deepseek_jax.layers.embed import Embedding, Head
from deepseek_jax.parallel.alltoall import nothing_sent
from deepseek_jax.parallel.mesh import global_batch, make_mesh, total
from deepseek_jax.train.cross_entropy import token_nll
from deepseek_jax.train.loss import Losses, together, totals
from deepseek_jax.train.step import StepConfig, Trainer

B, T, D, V = 4, 8, 6, 16
RATE, FADE, ALPHA = 0.01, 0.9, 0.5


class Toy(nnx.Module):
    """h = tanh(E[t] A): enough of a model to be trained."""

    def __init__(self, *, rngs: nnx.Rngs):
        self.embedding = Embedding(V, D, 1.0, rngs=rngs)
        self.mix_DF = param(rngs, (D, D), (None, None), normal(1.0), role="up")
        self.head = Head(D, V, 1.0, rngs=rngs)
        self.config = SimpleNamespace(vocab_size=V)

    def __call__(self, ids_BT):
        return jnp.tanh(self.embedding(ids_BT, jnp.float32) @ self.mix_DF[...])


class ExpectedHits:
    """An objective: the share of targets that samples would miss, and how much they would surprise."""

    def __call__(self, model, batch, over, step):
        nll_M = token_nll(model(batch.ids_BT).reshape(-1, D), model.head.weight_DV[...], batch.targets_BT.ravel(), 5)
        weights_M = batch.weights_BT.ravel() / over.weight
        misses, surprise = jnp.sum(weights_M * (1 - jnp.exp(-nll_M))), jnp.sum(weights_M * nll_M)
        parts, largest = {"surprise": surprise}, {"worst": jnp.max(nll_M)}
        return misses + ALPHA * surprise, Losses(misses, jnp.float32(0), parts, {}, nothing_sent(), largest)


class SignMomentum:
    """An optimizer: w <- w - rate * sign(m); its state is a tree like the weights, and a scalar."""

    def init(self, params):
        return {"trend": jax.tree.map(jnp.zeros_like, params), "calls": jnp.int32(0)}

    def update(self, gradients, state, params, rate):
        trend = jax.tree.map(lambda m, g: FADE * m + g, state["trend"], gradients)
        params = jax.tree.map(lambda w, m: w - rate * jnp.sign(m), params, trend)
        return params, {"trend": trend, "calls": state["calls"] + 1}


def is_trained(path: tuple[str, ...]) -> bool:
    """All but the embedding."""
    return path[0] != "embedding"


def batch() -> Batch:
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, V, (2, B, T), np.int32)
    ones = np.ones((B, T), np.int32)
    return Batch(ids, targets, ones, ones, rng.choice([0.0, 0.5, 1.0], (B, T)).astype(np.float32))


def last_part_first(loss, n_parts):
    """Gradients summed over the parts of a batch from the last to the first, without a loop that is compiled."""

    def gradients(params, state, batch):
        over, found = total(totals(batch)), []
        for part in reversed(range(n_parts)):
            rows = jax.tree.map(lambda x, part=part: jnp.split(x, n_parts)[part], batch)
            (value, losses), gradient = jax.value_and_grad(loss, has_aux=True)(params, state, rows, over)
            found.append((gradient, value, losses))
        sums = [jax.tree.map(lambda *parts: sum(parts), *[one[i] for one in found]) for i in (0, 1)]
        return *sums, functools.reduce(together, [losses for *_, losses in found])

    return gradients


def make_trainer(**options) -> Trainer:
    step = StepConfig(lambda step: RATE, clip_norm=1e9, micro_batches=2, balance_rate=0.0, balance_rate_stop=0)
    mesh = make_mesh(2, 1, jax.devices()[:2])
    parts = ExpectedHits(), lambda model, places: SignMomentum(), step
    return Trainer(lambda run, rngs: Toy(rngs=rngs), mesh, {}, *parts, trainable=is_trained, **options)


@pytest.fixture(scope="module")
def trainer() -> Trainer:
    return make_trainer()


@pytest.fixture(scope="module")
def run(trainer) -> tuple:
    """(the weights before, the state after ten steps, the reports)."""
    state = trainer.init(0)
    before, reports = jax.device_get(state["params"]), []
    for _ in range(10):
        state, report = trainer.step(state, global_batch(batch(), trainer.mesh))
        reports.append(jax.device_get(report))
    return before, state, reports


def by_hand(params: dict) -> tuple:
    """(loss, (misses, surprise, the worst surprise)) of the whole batch, with all logits at once."""
    ids_BT, targets_BT, _, _, weights_BT = batch()
    h_BTD = jnp.tanh(params["embedding"]["table_VD"][ids_BT] @ params["mix_DF"])
    log_p = jax.nn.log_softmax(h_BTD @ params["head"]["weight_DV"])
    log_p_BT = jnp.take_along_axis(log_p, targets_BT[..., None], axis=-1)[..., 0]
    misses = jnp.sum(weights_BT * (1 - jnp.exp(log_p_BT))) / weights_BT.sum()
    surprise = -jnp.sum(weights_BT * log_p_BT) / weights_BT.sum()
    return misses + ALPHA * surprise, (misses, surprise, -log_p_BT.min())


def test_the_objective_is_what_falls(run):
    before, _, reports = run
    loss, (misses, surprise, worst) = by_hand(before)
    assert reports[0].loss == pytest.approx(float(loss), rel=1e-5)
    assert reports[0].main == pytest.approx(float(misses), rel=1e-5)
    found = {"surprise": float(surprise), "worst": float(worst)}  # of four parts the largest, not a sum
    assert reports[0].auxiliary == pytest.approx(found, rel=1e-5)
    assert reports[-1].loss < 0.95 * reports[0].loss and reports[0].loads == {}


def test_the_optimizer_moves_what_is_trained(run, trainer):
    before, state, reports = run
    gradients = jax.grad(lambda params: by_hand(params)[0])(before)
    norm = np.sqrt(
        sum(np.sum(gradients[name] ** 2) for name in ("mix_DF",)) + np.sum(gradients["head"]["weight_DV"] ** 2)
    )
    assert reports[0].gradient_norm == pytest.approx(norm, rel=1e-5), "that of the frozen weights is not in it"
    once, _ = trainer.step(trainer.init(0), global_batch(batch(), trainer.mesh))
    np.testing.assert_allclose(
        once["params"]["mix_DF"], before["mix_DF"] - RATE * np.sign(gradients["mix_DF"]), rtol=1e-6
    )
    assert int(state["optimizer"]["calls"]) == 10


def test_frozen_weights_stay_and_have_no_optimizer_state(run, trainer):
    before, state, _ = run
    np.testing.assert_array_equal(state["params"]["embedding"]["table_VD"], before["embedding"]["table_VD"])
    assert state["params"].keys() == before.keys()
    assert state["optimizer"]["trend"].keys() == {"mix_DF", "head"}
    trend = state["optimizer"]["trend"]["head"]["weight_DV"]
    assert trend.addressable_shards[0].data.size * 2 == trend.size, "cut over both devices, as ZeRO-1 cuts it"


def test_a_trainer_needs_something_to_train():
    with pytest.raises(ValueError, match="trainable: no weight is trained"):
        Trainer(lambda run, rngs: Toy(rngs=rngs), make_mesh(1), {}, *[None] * 3, trainable=lambda path: False)


def test_a_state_begins_with_given_weights(trainer):
    other = jax.device_get(trainer.init(1))
    state = trainer.init(0, params=other["params"])
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), other)
    jax.tree.map(lambda x, like: x.sharding == like.sharding or pytest.fail(f"{x.sharding}"), state, trainer.abstract)
    with pytest.raises(ValueError, match=r"params.mix_DF is missing: expected float32\[6, 6\]"):
        trainer.init(0, params={name: other["params"][name] for name in ("embedding", "head")})
    with pytest.raises(ValueError, match=r"params.mix_DF is float64\[6, 6\]: expected float32\[6, 6\]"):
        trainer.init(0, params=other["params"] | {"mix_DF": np.eye(6)})


def test_gradients_of_parts_may_be_summed_in_another_order(trainer):
    other = make_trainer(gradients=last_part_first)
    states, reports = zip(
        *(made.step(made.init(0), global_batch(batch(), made.mesh)) for made in (trainer, other)), strict=True
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), *(s["optimizer"] for s in states))
    assert reports[1].gradient_norm == pytest.approx(float(reports[0].gradient_norm), rel=1e-5)
    assert reports[1].loss == pytest.approx(float(reports[0].loss), rel=1e-6)

"""Muon: polar factors against an SVD, two steps against numpy, one device against eight, saved and resumed."""

import itertools
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
from deepseek_jax.parallel.mesh import global_batch, make_mesh
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.train.loss import Losses
from deepseek_jax.train.optimizers import muon
from deepseek_jax.train.optimizers.muon import COEFFICIENTS, matrices_of, orthogonalized
from deepseek_jax.train.step import StepConfig, Trainer
from tests.train.test_step import leaves

MUON = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-20, "weight_decay": 0.1, "moments_dtype": "float32"}
MUON |= {"momentum": 0.95, "rms": 0.18}
RATE, D, H, Q, V, B, T = 0.02, 8, 2, 6, 16, 8, 4


def polar(matrices: np.ndarray) -> np.ndarray:
    u, _, vt = np.linalg.svd(np.float64(matrices), full_matrices=False)
    return u @ vt


@pytest.mark.parametrize("shape", [(1, 32, 32), (5, 16, 48), (3, 40, 8)])
def test_all_singular_values_become_one(shape):
    """Within 1e-2 in the spectral norm, small singular values too; zeros remain zeros."""
    matrices = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    u, s, vt = np.linalg.svd(matrices, full_matrices=False)
    steep = (u * np.geomspace(1, 1e-3, s.shape[-1])) @ vt
    for given in (matrices, 1e-12 * matrices, steep.astype(np.float32)):
        found = jax.jit(orthogonalized)(given)
        assert np.linalg.norm(found - polar(given), ord=2, axis=(1, 2)).max() < 1e-2
    assert not np.any(jax.jit(orthogonalized)(np.zeros(shape, np.float32)))


def test_matrices_a_few_at_a_time_are_as_all_at_once():
    given = np.random.default_rng(0).normal(size=(5, 4, 6)).astype(np.float32)
    some, whole = jax.jit(lambda x: (orthogonalized(x, at_once=48), orthogonalized(x)))(given)
    np.testing.assert_allclose(some, whole, atol=1e-6)


class Toy(nnx.Module):
    """Three stacked matrices with heads, a matrix, a gain: a weight of every kind, none whose stack divides by four."""

    def __init__(self, *, rngs: nnx.Rngs):
        init = normal(0.5)
        self.embedding = Embedding(V, D, 1.0, rngs=rngs)
        self.in_XDHQ = param(rngs, (3, D, H, Q), ("experts", "embed", "heads", None), init, role="attention_in")
        self.out_XHQD = param(rngs, (3, H, Q, D), ("experts", "heads", None, "embed"), init, role="attention_out")
        self.mix_DF = param(rngs, (D, 8), ("embed", "mlp"), init, role="up")
        self.back_FD = param(rngs, (8, D), ("mlp", "embed"), init, role="down")
        self.gain_D = param(rngs, (D,), (None,), nnx.initializers.ones, role="gain")
        self.head = Head(D, V, 1.0, rngs=rngs)
        self.config = SimpleNamespace(vocab_size=V)


class Misses:
    """An objective: the mean square distance of what the layers make of a token to what they should."""

    def __call__(self, model, batch, over, step):
        x = model.embedding(batch.ids_BT, jnp.float32)
        for layer in range(3):
            inner = jnp.tanh(jnp.einsum("btd,dhq->bthq", x, model.in_XDHQ[...][layer]))
            x = x + jnp.einsum("bthq,hqd->btd", inner, model.out_XHQD[...][layer])
        x = jnp.tanh(x @ model.mix_DF[...]) @ model.back_FD[...] * model.gain_D[...]
        logits = x @ model.head.weight_DV[...]
        loss = jnp.sum(jnp.square(logits - jax.nn.one_hot(batch.targets_BT, V))) / over.weight
        return loss, Losses(loss, jnp.float32(0), {}, {}, nothing_sent(), {})


def batch() -> Batch:
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, V, (2, B, T), np.int32)
    ones = np.ones((B, T), np.int32)
    return Batch(ids, targets, ones, ones, np.ones((B, T), np.float32))


def trainer(data: int = 1, expert: int = 1, rules: dict | None = None) -> Trainer:
    mesh = make_mesh(data, expert, jax.devices()[: data * expert])
    step = StepConfig(lambda step: RATE, clip_norm=1e9, micro_batches=1, balance_rate=0.0, balance_rate_stop=0)
    return Trainer(lambda run, rngs: Toy(rngs=rngs), mesh, rules or {}, Misses(), muon(**MUON), step)


def run(subject: Trainer, steps: int = 3) -> list:
    """The states before the first step and after each, on the host."""
    state = subject.init(0)
    states = [jax.device_get(state)]
    for _ in range(steps):
        state, _ = subject.step(state, global_batch(batch(), subject.mesh))
        states.append(jax.device_get(state))
    return states


@pytest.fixture(scope="module")
def one_device() -> list:
    return run(trainer())


SHAPES = {"in_XDHQ": (3, D, H * Q), "out_XHQD": (3, H * Q, D), "mix_DF": (1, D, 8), "back_FD": (1, 8, D)}


def test_which_weights_are_matrices():
    assert {path[0] for path in matrices_of(nnx.eval_shape(lambda: Toy(rngs=nnx.Rngs(0))))} == set(SHAPES)


def test_steps_are_the_published_ones(one_device):
    """Gradients of each step, by jax; the rest in numpy: momentum, ten steps per matrix, its size, weight decay."""
    subject = trainer()

    def loss(params):
        value, _ = Misses()(subject.bind(params, {}), batch(), SimpleNamespace(weight=float(B * T)), 0)
        return value

    gradient, m = jax.jit(jax.grad(loss)), dict.fromkeys(SHAPES, 0.0)
    for before, after in itertools.pairwise(one_device):
        g = jax.device_get(gradient(before["params"]))
        for name, (n, rows, columns) in SHAPES.items():
            m[name] = 0.95 * m[name] + np.float64(g[name])
            x = (0.95 * m[name] + g[name]).reshape(n, rows, columns)
            for one in range(n):
                y = x[one] / np.linalg.norm(x[one])
                for a, b, c in [(3.4445, -4.7750, 2.0315)] * 8 + [(2, -1.5, 0.5)] * 2:
                    y = a * y + b * (y @ y.T) @ y + c * (y @ y.T) @ (y @ y.T) @ y
                x[one] = y * np.sqrt(max(rows, columns)) * 0.18
            w = before["params"][name]
            expected = w - RATE * (x.reshape(w.shape) + 0.1 * w)
            np.testing.assert_allclose(after["params"][name], expected, rtol=1e-4, atol=1e-5, err_msg=name)
            np.testing.assert_allclose(after["optimizer"]["mu"][name], m[name], rtol=1e-4, atol=1e-5, err_msg=name)
    assert COEFFICIENTS == ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2


def test_the_rest_is_adamws(one_device):
    first, after = one_device[0]["params"], one_device[1]
    assert set(after["optimizer"]["nu"]) == {"embedding", "head", "gain_D"}
    assert set(after["optimizer"]["mu"]) == set(first)
    moved = np.abs(after["params"]["gain_D"] - first["gain_D"])
    np.testing.assert_allclose(moved, RATE, rtol=1e-4)  # Adam's first step, without decay


@pytest.mark.parametrize(
    ("data", "expert", "rules"), [(4, 1, {}), (2, 2, {"embed": "data", "mlp": "expert"})], ids=["ZeRO-1", "FSDP"]
)
def test_matrices_in_parts_are_updated_whole(one_device, data, expert, rules):
    """Three matrices over four devices: each owns one, the fourth none. Moments and weights stay divided."""
    subject = trainer(data, expert, rules)
    cut = [place for place in jax.tree.leaves(subject.placements) if any(place.state_spec)]
    assert len(cut) >= 5
    for (path, known), (_, found) in zip(leaves(one_device[-1]), leaves(run(subject)[-1]), strict=True):
        np.testing.assert_allclose(found, known, rtol=2e-4, atol=2e-5, err_msg=path)


def test_a_saved_state_continues_bit_for_bit(one_device, tmp_path):
    subject = trainer()
    with Checkpointer(tmp_path / "run", keep=2, warn=print) as checkpoints:
        checkpoints.save(1, jax.device_put(one_device[1]), {})
        checkpoints.wait()
        _, state, _ = checkpoints.restore(subject.abstract)
    for known in one_device[2:]:
        state, _ = subject.step(state, global_batch(batch(), subject.mesh))
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(state), known)

"""Padding counts nowhere, and a weight says how much a target counts.

In the loss, in its gradients, in multi-token prediction, and in the loads and losses that balance the experts.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.data.pipeline import Batch
from deepseek_jax.layers.base import bind
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import family
from deepseek_jax.train.loss import losses, totals

pytestmark = pytest.mark.slow  # compiles losses and gradients of a model for long

V = 64
LENGTHS = (7, 9, 5, 11)  # tokens of each document


def documents() -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids, weight of each id as a target) of each document."""
    rng = np.random.default_rng(5)
    return [(rng.integers(0, V, n), rng.choice([0.0, 0.5, 1.0], n)) for n in LENGTHS]


def batch_of(rows: list[list[int]], n_tokens: int, padding: int = 0) -> Batch:
    """Rows of the documents with these numbers, filled up with the id `padding`."""
    batch = Batch(*(np.zeros((len(rows), n_tokens), dtype) for dtype in [np.int32] * 4 + [np.float32]))
    batch.ids_BT[:], batch.targets_BT[:] = padding, -1
    for b, row in enumerate(rows):
        at = 0
        for number, document in enumerate(row, start=1):
            tokens, weights = documents()[document]
            here, followed = slice(at, at + len(tokens)), slice(at, at + len(tokens) - 1)
            batch.ids_BT[b, here], batch.segments_BT[b, here] = tokens, number
            batch.positions_BT[b, here] = np.arange(len(tokens))
            batch.targets_BT[b, followed], batch.weights_BT[b, followed] = tokens[1:], weights[1:]
            at += len(tokens)
    return batch


PACKED = batch_of([[0, 1], [2, 3], [], []], 16)
PADDED = batch_of([[0], [1], [2], [3]], 16, padding=9)
TWICE = batch_of([[0, 1], [2, 3], [0, 1], [2, 3]], 16)


@pytest.fixture(scope="module")
def model(tiny_sizes, filled):
    """(definition, params, router biases) of a small V3 with two depths of multi-token prediction."""
    sizes = tiny_sizes.copy_and_resolve_references()
    sizes.update(n_layers=1, n_dense_layers=0, mtp_depth=2)
    module = family("v3")
    return filled(lambda: module.Model(module.Config.from_config(sizes), rngs=nnx.Rngs(0)), std=0.1)


@pytest.fixture(scope="module")
def run(model):
    """A function from a batch and alpha to ((loss, `Losses`), gradients)."""
    definition, params, router_bias = model

    @jax.jit
    def call(batch, alpha):
        def loss(params):
            m = bind(definition, params, router_bias)
            found = losses(m, batch, totals(batch), chunk=16, mask=True)
            return found.weighted(0.3, {"expert_balance": alpha}), found

        return jax.value_and_grad(loss, has_aux=True)(params)

    return lambda batch, alpha=0.0: call(batch, alpha)


def assert_close(a, b):
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=1e-7), a, b)


def test_packed_is_padded(run):
    """The same documents side by side, and each in a row of its own: losses, loads and gradients are the same."""
    (loss, packed), gradients = run(PACKED)
    (other_loss, padded), other_gradients = run(PADDED)
    assert_close((loss, packed.main, packed.mtp), (other_loss, padded.main, padded.mtp))
    jax.tree.map(np.testing.assert_array_equal, packed.loads, padded.loads)
    assert_close(gradients, other_gradients)


def test_rows_of_padding_change_no_mean(run):
    """Nor the balance losses, which are means over the sequences: the same as with the text of the others again."""
    (loss, packed), gradients = run(PACKED, 0.1)
    (other_loss, twice), other_gradients = run(TWICE, 0.1)
    assert_close((loss, packed[:3]), (other_loss, twice[:3]))
    assert_close(gradients, other_gradients)
    jax.tree.map(lambda once, both: np.testing.assert_array_equal(2 * once, both), packed.loads, twice.loads)
    assert float(packed.auxiliary["expert_balance"]) > 2


def test_loads_count_the_text_alone(run):
    (_, found), _ = run(PADDED)
    n_tokens, n_followed = sum(LENGTHS), sum(LENGTHS) - len(LENGTHS)
    np.testing.assert_array_equal(np.sum(found.loads["moe_blocks"], axis=1), 2 * n_tokens)
    assert np.sum(found.loads["mtp"]["0"]) == 2 * n_followed
    assert np.sum(found.loads["mtp"]["1"]) == 2 * (n_followed - len(LENGTHS))


def test_a_weight_goes_with_its_target(model, run):
    """In the main model and at each depth, which reads every token; all are divided by the main model's weight."""
    definition, params, router_bias = model
    batch, weight_DV = PADDED, np.float64(params["head"]["weight_DV"])

    @jax.jit
    def hidden(params):
        m = bind(definition, params, router_bias)
        tokens = Tokens(batch.ids_BT, batch.positions_BT, batch.segments_BT)
        h, _ = m.hidden(tokens)
        return [h, *(depth.h_BTD for depth in m.mtp_depths(h, batch.targets_BT, tokens))]

    nats = []
    for ahead, h_BTD in enumerate(hidden(params), start=1):
        logits = np.float64(h_BTD) @ weight_DV
        log_p = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        terms = [
            -weights[i + ahead] * log_p[b, i, tokens[i + ahead]]
            for b, (tokens, weights) in enumerate(documents())
            for i in range(len(tokens) - ahead)
        ]
        nats.append(sum(terms) / sum(weights[1:].sum() for _, weights in documents()))
    (_, found), _ = run(PADDED)
    assert float(found.main) == pytest.approx(nats[0], rel=1e-5)
    assert float(found.mtp) == pytest.approx(np.mean(nats[1:]), rel=1e-5)
    assert nats[0] > 3 and nats[1] > 2

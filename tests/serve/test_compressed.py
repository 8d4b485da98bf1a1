"""The engine with compressed attention: entries in pages, window and open blocks in a row per running request."""

import jax
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import SINGLE_DEVICE, bind, split
from deepseek_jax.layers.block import Block
from deepseek_jax.layers.compressed import CompressedAttention, CompressedConfig
from deepseek_jax.layers.decoder import Decoder, Stack
from deepseek_jax.layers.indexer import IndexerConfig
from deepseek_jax.layers.swiglu import SwiGLU
from deepseek_jax.serve.engine import Engine, Sampling

D, V, LONGEST, N_NEW = 16, 48, 40, 9
SIZES = CompressedConfig(2, 8, 4, 8, 2, 4, window=5, init_std=0.4)
INDEX = IndexerConfig(8, 4, 2, SIZES.q_rank, init_std=0.4)
KINDS = ((4, INDEX), (8, None))
DRAW = np.random.default_rng(1)
PROMPTS = [DRAW.integers(0, V, n).tolist() for n in (1, 19, 4)]
PROMPTS.append([*PROMPTS[1][:17], 7, 8])  # begins as the one before


def block(kind, rngs):
    ratio, index = kind
    return Block(
        lambda rngs: CompressedAttention(SIZES, D, ratio=ratio, index=index, rngs=rngs),
        lambda rngs: SwiGLU(D, D, 0.4, rngs=rngs),
        "mlp",
        D,
        1e-6,
        rngs=rngs,
    )


@pytest.fixture(scope="module")
def network():
    """(definition, weights, the greedy text of a prompt by whole forward passes)."""
    builds = tuple(lambda rngs, kind=kind: block(kind, rngs) for kind in KINDS)
    kept = []

    @jax.jit
    def build():
        definition, *weights = split(
            Decoder(V, D, 1e-6, 0.4, SINGLE_DEVICE, [Stack("blocks", builds, 2)], rngs=nnx.Rngs(2))
        )
        kept.append(definition)
        return weights

    weights = tuple(build())

    @jax.jit
    def best(weights, ids_BT):
        return bind(kept[0], *weights)(ids_BT).argmax(-1)

    def text(prompt):
        ids = list(prompt)
        for _ in range(N_NEW):
            padded = np.zeros((1, LONGEST), np.int32)
            padded[0, : len(ids)] = ids
            ids.append(int(best(weights, padded)[0, len(ids) - 1]))
        return ids[len(prompt) :]

    return kept[0], weights, [text(prompt) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def engine(network):
    definition, weights, _ = network

    def make(**options):
        made = Engine(definition, weights, LONGEST, **{"page_size": 8, "n_rows": 2, "chunk": 16} | options)
        made._pads_to_largest = True  # few programs
        return made

    return make


SETTINGS = {
    "as it is": {},
    "in small parts, several steps per program": {"chunk": 5, "n_steps": 4, "n_ahead": 2},
    "a small pool": {"n_pages": 6},
}


@pytest.mark.slow
@pytest.mark.matrix  # `test_v4.py` has such layers in a whole model
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_text_is_that_of_whole_forward_passes(network, engine, setting):
    made = engine(**SETTINGS[setting])
    requests = [made.submit(prompt, Sampling(N_NEW)) for prompt in PROMPTS]
    found = {request: [] for request in requests}
    while not made.is_idle:
        for output in made.step():
            found[output.request] += output.ids
    assert [found[request] for request in requests] == network[2]
    assert not any(request.n_cached for request in requests)  # no window of the other request is left


@pytest.mark.slow
def test_what_the_layout_does_not_allow_is_refused(network, engine, tmp_path):
    definition, weights, _ = network
    with pytest.raises(UserError, match="multiple of 8"):
        engine(page_size=12)
    assert Engine(definition, weights, 40, n_rows=1).page_size == 64
    with pytest.raises(UserError, match="on the disk"):
        engine().keep_on_disk(tmp_path, 1000)

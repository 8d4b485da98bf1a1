"""An engine whose cache is in FP8: half the memory, nearly the same logits, and the same text however it runs."""

from dataclasses import replace

import numpy as np
import pytest

from deepseek_jax import run_config
from deepseek_jax.abstract_model import run_as
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import bind, split
from deepseek_jax.serve.engine import Engine, Sampling
from tests.serve.conftest import SIZES, Network

pytestmark = pytest.mark.slow  # compiles an engine

DRAW = np.random.default_rng(3)
PROMPTS = [DRAW.integers(0, 200, n).tolist() for n in (3, 20, 9)]


def in_fp8(network):
    run = replace(bind(network.definition, *network.weights).run, cache="fp8")
    return split(run_as(network.config, run))[0]


@pytest.fixture(scope="module")
def wide():
    """A network with latents of 128 numbers."""
    config = run_config.load("tiny_v3")
    config.model.update(SIZES | {"kv_rank": 128, "n_layers": 2, "mtp_depth": 1})
    return Network(config)


@pytest.fixture(scope="module")
def engine(wide):
    programs, definition = set(), in_fp8(wide)

    def make(**options):
        options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 9} | options
        made = Engine(definition, wide.weights, 32, **options)
        made._pads_to_largest = True  # few programs
        programs.add(made.programs)
        return made

    return make


def run(engine):
    requests = [engine.submit(prompt, Sampling(9, logprobs=0)) for prompt in PROMPTS]
    found = {request: [] for request in requests}
    while not engine.is_idle:
        for output in engine.step():
            found[output.request] += zip(output.ids, [one.logprob for one in output.logprobs], strict=True)
    return [found[request] for request in requests]


def test_an_entry_has_the_bytes_of_the_published_format(engine):
    stack = engine().calls.memory.cache["moe_blocks"]
    assert stack.entry_BSY.dtype == np.uint8 and stack.entry_BSY.shape[1:] == (9, 8, 128 + 4 + 2 * SIZES["rope_width"])


@pytest.mark.parametrize("options", [{"chunk": 4}, {"n_steps": 4, "n_ahead": 0}], ids=["small parts", "several steps"])
def test_the_text_does_not_depend_on_how_it_is_computed(engine, options):
    texts, others = ([[token for token, _ in row] for row in run(made)] for made in (engine(), engine(**options)))
    assert texts == others


def test_log_probabilities_are_nearly_those_of_the_forward_pass(engine, wide):
    errors = []
    for prompt, found in zip(PROMPTS, run(engine()), strict=True):
        ids = list(prompt)
        for token, logprob in found:
            logits = wide.last_logits(ids).astype(np.float64)
            errors.append(logprob - (logits[token] - np.log(np.exp(logits).sum())))
            ids.append(token)
    assert 1e-5 < np.median(np.abs(errors)) < 0.05  # the largest are those of tokens that chose other experts


def test_other_latents_are_refused(network):
    with pytest.raises(UserError, match="latents of 8 numbers"):
        in_fp8(network)

"""The engine with sparse attention, whose indexer's keys lie in the pages: its text is that of the forward pass."""

from dataclasses import replace

import numpy as np
import pytest

from deepseek_jax import run_config
from deepseek_jax.abstract_model import run_as
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import Execution, bind, split
from deepseek_jax.serve.engine import Engine, Sampling
from deepseek_jax.serve.pages import PagePool
from deepseek_jax.serve.ranks import Rank
from tests.serve.conftest import SIZES, Network

pytestmark = pytest.mark.slow  # compiles an engine

DRAW = np.random.default_rng(1)
PROMPTS = [DRAW.integers(0, 200, n).tolist() for n in (1, 19, 4)]
PROMPTS.append([*PROMPTS[1][:17], 7, 8])  # shares two pages with the one before
N_NEW = 11
ONE_LAYER = SIZES | {"mtp_depth": 1, "n_layers": 1, "n_dense_layers": 0}
TOP_K = 6  # positions of up to 30, in pages of 8


def network_of(**sizes):
    config = run_config.load("tiny_v32")
    config.model.update(ONE_LAYER | {"index_heads": 3, "index_width": 8, "index_top_k": TOP_K} | sizes)
    return Network(config)


@pytest.fixture(scope="module")
def sparse():
    return network_of()


@pytest.fixture(scope="module")
def engine(sparse):
    """Makes engines that share their compiled programs, by the number of drafts."""
    programs = set()

    def make(n_drafts=1, n_pages=9, **options):
        options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 9} | options
        made = Engine(sparse.definition, sparse.weights, 32, n_drafts=n_drafts, **options)
        made._pads_to_largest = True  # few programs
        programs.add(made.programs)
        made.ranks[0] = Rank(PagePool(n_pages, 8, look_ahead=n_drafts), options["n_rows"], options["chunk"])
        return made

    return make


def run(engine):
    requests = [engine.submit(prompt, Sampling(N_NEW)) for prompt in PROMPTS]
    found = {request: [] for request in requests}
    while not engine.is_idle:
        for output in engine.step():
            found[output.request] += output.ids
    return requests, [found[request] for request in requests]


@pytest.fixture(scope="module")
def texts(sparse):
    """What the forward pass says, greedily."""
    found = []
    for prompt in PROMPTS:
        ids = list(prompt)
        for _ in range(N_NEW):
            ids.append(int(sparse.last_logits(ids).argmax()))
        found.append(ids[len(prompt) :])
    return found


SETTINGS = {
    "without drafts": {"n_drafts": 0},
    "with drafts": {},
    "several steps per program": {"n_steps": 4},
    "prompts in small parts, the host late": {"chunk": 4, "n_ahead": 2},
    "a small pool": {"n_pages": 6},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_text_is_that_of_the_forward_pass(engine, texts, setting):
    made = engine(**SETTINGS[setting])
    requests, found = run(made)
    assert found == texts
    assert (made.n_drafted > 0) == (setting != "without drafts")
    assert (sum(request.n_preempted for request in requests) > 0) == (setting == "a small pool")


@pytest.mark.slow
def test_a_cache_in_fp8_has_the_published_bytes_and_nearly_the_same_log_probabilities():
    wide = network_of(kv_rank=128, index_width=128, mtp_depth=0)
    run_in_fp8 = replace(bind(wide.definition, *wide.weights).run, cache="fp8")
    definition = split(run_as(wide.config, run_in_fp8))[0]
    made = Engine(definition, wide.weights, 32, page_size=8, n_rows=2, chunk=16, n_pages=9)
    made._pads_to_largest = True  # few programs
    stack = made.calls.memory.cache["moe_blocks"]
    assert stack.k_index_BSY.shape[1:] == (9, 8, 132) and stack.k_index_BSY.dtype == np.uint8
    request = made.submit(PROMPTS[1], Sampling(N_NEW, logprobs=0))
    found = []
    while not made.is_idle:
        for output in made.step():
            found += zip(output.ids, [one.logprob for one in output.logprobs], strict=True)
    ids, errors = list(request.prompt), []
    for token, logprob in found:
        logits = wide.last_logits(ids).astype(np.float64)
        errors.append(abs(logprob - (logits[token] - np.log(np.exp(logits).sum()))))
        ids.append(token)
    assert 1e-5 < np.median(errors) < 0.1


@pytest.mark.parametrize(
    ("name", "sizes", "expected"),
    [
        ("tiny_v32", {"kv_rank": 128, "index_width": 384}, "keys of 384 .* a multiple of 128, and a power of two"),
        ("tiny_v4", {"index_width": 24}, "keys of 24 .* a power of two"),
    ],
)
def test_keys_of_other_widths_are_refused_in_fp8(name, sizes, expected):
    """There is no Hadamard matrix of these."""
    config = run_config.load(name)
    config.model.update(sizes)
    with pytest.raises(UserError, match=expected):
        run_as(config, Execution(cache="fp8"))

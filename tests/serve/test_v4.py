"""The engine with a whole V4: its text is what the model draws from whole sequences, however prompts are divided.

Window, compressors, an indexer that chooses, a table of experts, streams: a network as small as can be with all of it.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import bind
from deepseek_jax.models import v4
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.generate import Generator
from deepseek_jax.serve.offline import complete
from deepseek_jax.serve.sampler import row_keys, sample
from deepseek_jax.serve.sampling import Sampling

pytestmark = pytest.mark.slow  # compiles an engine
V, LONGEST, N_NEW, PAGE = 48, 96, 10, 8
SMALL = {"vocab_size": V, "d_model": 16, "n_layers": 3, "compress_ratios": (0, 4, 8, 0), "window": 5, "head_width": 8}
SMALL |= {"n_heads": 2, "rope_width": 4, "q_rank": 8, "out_rank": 4, "index_heads": 2, "index_width": 4}
SMALL |= {"index_top_k": 3, "n_experts": 6, "expert_width": 8, "top_k": 2, "n_streams": 2, "sinkhorn_steps": 2}
DRAW = np.random.default_rng(1)
PROMPTS = [DRAW.integers(0, V, n).tolist() for n in (1, 75, 4, 33)]
PROMPTS.append([*PROMPTS[1][:67], 7, 8])  # begins as the one before
WAYS = [Sampling(N_NEW), Sampling(N_NEW, temperature=1.0, seed=3)]


class Twin:
    """A network, and what it draws from whole sequences."""

    def __init__(self, filled):
        m = run_config.load("tiny_v4").model
        m.update(SMALL)
        sizes = v4.Config.from_config(m)
        self.definition, params, biases = filled(lambda: v4.Model(sizes, rngs=nnx.Rngs(0)), std=0.3)
        table = np.random.default_rng(2).random((1, V, m.n_experts)).argsort(-1)[..., : m.top_k].astype(np.int32)
        biases["blocks_0"]["experts"]["router"]["experts_VK"] = jnp.asarray(table)
        self.weights, definition = (params, biases), self.definition

        @jax.jit
        def draw(weights, ids_BT, place, key, temperature):
            logits_BV = bind(definition, *weights)(ids_BT)[:, place]
            return sample(logits_BV, jax.random.fold_in(key, place + 1)[None], temperature)[0]

        self._draw = draw
        self.text = functools.cache(self._text)

    def _text(self, number, way):
        ids, n = np.zeros((1, LONGEST), np.int32), len(PROMPTS[number])
        ids[0, :n] = PROMPTS[number]
        key = jax.random.wrap_key_data(WAYS[way].key_data)
        for place in range(n, n + N_NEW):
            ids[0, place] = self._draw(self.weights, ids, np.int32(place - 1), key, np.float32(WAYS[way].temperature))
        return ids[0, n : n + N_NEW].tolist()

    def engine(self, **options):
        sizes = {"page_size": PAGE, "n_rows": 3, "chunk": LONGEST} | options
        made = Engine(self.definition, self.weights, LONGEST, **sizes)
        made._pads_to_largest = True  # few programs
        return made


@pytest.fixture(scope="module")
def twin(filled):
    return Twin(filled)


def check(twin, *, alone=False, ways=(0, 1), **options):
    """All prompts by these ways of drawing, each of which compiles; returns the engine, with `n_preempted`."""
    made, found = twin.engine(**options), {}
    pairs = list(itertools.product(range(len(PROMPTS)), ways))
    for some in [[pair] for pair in pairs] if alone else [pairs]:
        requests = {made.submit(PROMPTS[number], WAYS[way]): (number, way) for number, way in some}
        found |= {pair: [] for pair in requests.values()}
        while not made.is_idle:
            for output in made.step():
                found[requests[output.request]] += output.ids
        made.n_preempted = sum(request.n_preempted for request in requests)
        assert not any(request.n_cached for request in requests)  # what a window holds of others is no longer there
    assert found == {pair: twin.text(*pair) for pair in pairs}
    return made


def test_the_text_is_that_of_whole_forward_passes(twin):
    """Parts of prompts with borders off those of blocks, few pages, several steps per program, the host late."""
    assert check(twin, ways=(1,), chunk=13, n_pages=14, n_steps=8, n_ahead=2).n_preempted > 0
    assert len({tuple(twin.text(number, way)) for number in range(len(PROMPTS)) for way in (0, 1)}) > len(PROMPTS)


CASES = [
    {"chunk": chunk, "n_steps": n_steps, "n_ahead": n_ahead, "n_pages": n_pages}
    for chunk, n_steps, n_ahead, n_pages in itertools.product((32, 64, LONGEST), (1, 8), (0, 1), (22, None))
]


@pytest.mark.matrix
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case.values())))
def test_any_setting_gives_the_same_text(twin, case):
    made = check(twin, **case)
    assert (made.n_preempted > 0) == (case["n_pages"] is not None)


@pytest.mark.matrix
def test_each_alone_gives_the_text_of_a_batch(twin):
    check(twin, alone=True, chunk=32, n_steps=8)
    check(twin, chunk=32, n_prompts=2)


@pytest.mark.matrix
def test_one_padded_batch_gives_the_same_text(twin):
    generator = Generator(twin.definition, chunk=32, block=4)
    prompts, limits = [np.array(prompt) for prompt in PROMPTS], {"max_new_tokens": N_NEW, "n_positions": LONGEST}
    drawn_BT = generator.generate(*twin.weights, prompts, row_keys(0, len(PROMPTS)), **limits)
    assert drawn_BT.tolist() == [twin.text(number, 0) for number in range(len(PROMPTS))]


@pytest.mark.parametrize("n_steps", [1, pytest.param(8, marks=pytest.mark.matrix)])  # 8: a program of its own, and 1
def test_drafts_change_no_text(twin, n_steps):
    """Wrong drafts pass through windows and open blocks; some drafts are right."""
    ways = (0, 1) if n_steps > 1 else (1,)
    made = check(twin, ways=ways, n_drafts=1, chunk=13, n_steps=n_steps, n_ahead=1, n_pages=25)
    assert made.n_accepted > 0 and made.n_drafted > 2 * made.n_accepted


def test_a_page_holds_whole_blocks(twin):
    assert not twin.engine().finds_prompts
    with pytest.raises(UserError, match="Choose a multiple of 8"):
        twin.engine(page_size=12)


@pytest.mark.matrix
def test_requests_with_log_probabilities_report_those_of_the_model(twin):
    (one,) = complete(twin.engine(chunk=13, n_steps=8), PROMPTS[3:4], [Sampling(3, logprobs=0, prompt_logprobs=True)])
    assert one.ids == twin.text(3, 0)[:3]
    assert len(one.prompt_logprobs) == len(PROMPTS[3]) and all(found.logprob < 0 for found in one.prompt_logprobs[1:])

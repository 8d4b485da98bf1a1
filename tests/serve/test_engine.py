"""Every way to run gives the text that a forward pass over the whole sequence gives."""

import itertools

import jax
import numpy as np
import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.serve.engine import Engine, Sampling

DRAW = np.random.default_rng(0)
PROMPTS = [DRAW.integers(0, 200, n).tolist() for n in (1, 3, 17, 9, 8, 20)]
PROMPTS.append([*PROMPTS[5][:16], 7, 8])  # shares pages with the one before


@pytest.fixture(scope="module")
def alone(network):
    """Greedy continuations by full forward passes, and the margins by which they win."""
    found = []
    for prompt in PROMPTS:
        ids, margin = list(prompt), np.inf
        for _ in range(10):
            logits = network.last_logits(ids)
            second, first = np.sort(logits)[-2:]
            margin = min(margin, first - second)
            ids.append(int(np.argmax(logits)))
        assert margin > 1e-4
        found.append(ids[len(prompt) :])
    return found


@pytest.fixture(scope="module")
def engine(network):
    """Makes engines that share their compiled programs."""
    programs = {}

    def make(**options):
        options = {"page_size": 8, "n_rows": 4, "chunk": 16, "n_pages": 17} | options
        made = Engine(network.generator.definition, network.weights, 32, **options)
        made._programs = programs.setdefault((made.pages.n_pages, len(made._last_R)), {})
        return made

    return make


def run(engine, samplings, prompts=PROMPTS, later=()):
    """Submits prompts, some of them `later` after as many steps; returns their new ids."""
    requests, texts, n_steps = [], {}, 0
    queue = [(later[i] if later else 0, prompt) for i, prompt in enumerate(prompts)]
    while queue or not engine.is_idle:
        while queue and queue[0][0] <= n_steps:
            requests.append(engine.submit(queue.pop(0)[1], samplings[len(requests)]))
        for request, ids, ending in engine.step():
            texts.setdefault(request, []).extend(ids)
            if ending:
                texts[request].append(ending)
        engine.pages.check(request.table for request in requests)
        n_steps += 1
        assert n_steps < 1000
    return requests, [texts[request] for request in requests]


SETTINGS = {
    "as it comes": {},
    "prompts in small parts": {"chunk": 4},
    "a pool that is too small": {"n_pages": 8},
    "the host looks at once": {"n_ahead": 0},
    "the host looks late": {"n_ahead": 3},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_text_is_that_of_the_forward_pass(engine, alone, setting):
    made = engine(**SETTINGS[setting])
    requests, texts = run(made, [Sampling(10)] * len(PROMPTS))
    assert texts == [[*ids, "length"] for ids in alone]
    assert (sum(request.n_preempted for request in requests) > 0) == (setting == "a pool that is too small")
    assert made.pages.n_free == made.pages.n_pages - 1


def test_draws_do_not_depend_on_company(engine, alone):
    samplings = [Sampling(10, temperature=1.0 + i / 10, top_p=1.0 - i / 20, seed=i) for i in range(len(PROMPTS))]
    samplings[2] = Sampling(10)  # greedy among those that draw
    texts = run(engine(n_pages=8, n_ahead=2), samplings)[1]
    assert run(engine(chunk=4), samplings, later=[0, 0, 1, 5, 5, 9, 12])[1] == texts
    assert texts[2] == [*alone[2], "length"]
    assert len({tuple(text) for text in texts}) == len(texts)


def test_the_generator_draws_the_same(engine, network):
    text = run(engine(), [Sampling(8, temperature=0.8, top_p=0.9, seed=5)], PROMPTS[2:3])[1][0]
    key_B = jax.random.split(jax.random.key(0), 1).at[0].set(jax.random.key(5))
    steps = network.stream([PROMPTS[2]], key_B, max_new_tokens=8, temperature=0.8, top_p=0.9)
    assert [int(ids_B[0]) for ids_B in steps] == text[:-1]


def test_a_stop_id_ends_a_text_and_its_pages_are_free(engine, alone):
    stop = alone[3][4]
    made = engine()
    requests, texts = run(made, [Sampling(10, stop_ids=(stop,))] * len(PROMPTS))
    assert texts[3] == [*alone[3][: alone[3].index(stop) + 1], "stop"]
    assert all(request.has_ended for request in requests)
    assert made.pages.n_free == made.pages.n_pages - 1


def test_a_prompt_that_the_cache_has_is_not_computed_again(engine, alone):
    made = engine()
    run(made, [Sampling(10)], PROMPTS[5:6])
    requests, texts = run(made, [Sampling(10)] * 2, PROMPTS[5:7])
    assert texts == [[*ids, "length"] for ids in alone[5:7]]
    assert [request.n_cached for request in requests] == [16, 16]
    salted, texts = run(made, [Sampling(10, salt=b"other")], PROMPTS[5:6])
    assert (salted[0].n_cached, texts) == (0, [[*alone[5], "length"]])


def test_new_weights_find_no_old_pages(engine, network, alone):
    made = engine()
    run(made, [Sampling(10)], PROMPTS[5:6])
    other = jax.tree.map(lambda w: w * 1.5, network.weights)
    made.replace_weights(other)
    requests, changed = run(made, [Sampling(10)], PROMPTS[5:6])
    assert requests[0].n_cached == 0 and changed != [[*alone[5], "length"]]
    made.replace_weights(network.weights)
    requests, texts = run(made, [Sampling(10)], PROMPTS[5:6])
    assert (requests[0].n_cached, texts) == (0, [[*alone[5], "length"]])


def test_a_cancelled_request_says_no_more_and_disturbs_nobody(engine, alone):
    made = engine()
    requests = [made.submit(prompt, Sampling(10)) for prompt in PROMPTS[:4]]
    texts = {request: [] for request in requests}
    for number in range(40):
        if number == 3:
            made.cancel(requests[1])
            made.cancel(requests[3])
        for request, ids, _ in made.step():
            assert number < 3 or request in (requests[0], requests[2])
            texts[request] += ids
    assert made.is_idle and made.pages.n_free == made.pages.n_pages - 1
    assert [texts[requests[0]], texts[requests[2]]] == [alone[0], alone[2]]


def test_after_compile_no_request_compiles(engine):
    made = engine()
    n_programs = made.compile()
    assert n_programs == 8  # one, two or four rows, and parts of 16 tokens (32 positions are four pages); twice
    run(made, [Sampling(10, temperature=1.0, seed=3)] * len(PROMPTS), [[1 + i for i in p] for p in PROMPTS])
    run(made, [Sampling(10)] * len(PROMPTS))
    run(made, [Sampling(1)], [[5]])
    run(made, [Sampling(31)], [[5]])
    assert len(made._programs) == n_programs


class Ladder:
    """Allows the `width` tokens from three times the last one on; everything at first."""

    def __init__(self, width):
        self.width, self.last = width, None

    def allowed(self):
        if self.last is None:
            return None
        bits = np.zeros(13 * 32, bool)  # more than the vocabulary has
        bits[[(3 * self.last + i) % 200 for i in range(self.width)]] = True
        return np.packbits(bits, bitorder="little").view(np.uint32)[: -(-272 // 32)]

    def push(self, token):
        self.last = token


@pytest.mark.parametrize("n_ahead", [0, 1, 3])
def test_a_constrained_request_draws_what_is_allowed_and_its_neighbours_what_they_would(engine, alone, n_ahead):
    samplings = [Sampling(10)] * len(PROMPTS)
    samplings[1] = Sampling(10, constraint=Ladder(1))
    samplings[4] = Sampling(10, temperature=1.5, seed=3, constraint=Ladder(4))
    made = engine(n_pages=8, n_ahead=n_ahead)
    texts = run(made, samplings)[1]
    for number in (1, 4):
        ids = texts.pop(number if number == 1 else number - 1)[:-1]
        assert len(ids) == 10
        assert all((b - 3 * a) % 200 < (1 if number == 1 else 4) for a, b in itertools.pairwise(ids))
        assert number == 4 or ids[0] == alone[1][0]
    others = [ids for number, ids in enumerate(alone) if number not in (1, 4)]
    assert texts == [[*ids, "length"] for ids in others]


def test_what_cannot_run_is_refused(engine):
    with pytest.raises(UserError, match="a prompt of 32 tokens for 32 positions"):
        engine().submit([1] * 32, Sampling(4))
    with pytest.raises(UserError, match="the cache holds 16 tokens"):
        engine(n_pages=3).submit([1] * 16, Sampling(4))

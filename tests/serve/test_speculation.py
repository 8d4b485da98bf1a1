"""With drafts of multi-token prediction or without them, a request draws the same tokens."""

import dataclasses
import itertools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax import on_mesh
from deepseek_jax.errors import UserError
from deepseek_jax.kernels import Kernels
from deepseek_jax.layers.base import bind
from deepseek_jax.layers.cache import first_pass
from deepseek_jax.layers.tokens import Tokens, at
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.serve import speculation
from deepseek_jax.serve.engine import Engine, Sampling
from deepseek_jax.serve.pages import PagePool
from deepseek_jax.serve.programs import Programs
from deepseek_jax.serve.ranks import Rank
from deepseek_jax.serve.scheduler import Part
from tests.serve.test_engine import Ladder

pytestmark = pytest.mark.slow  # compiles engines with drafts and without

DRAW = np.random.default_rng(1)
PROMPTS = [DRAW.integers(0, 200, n).tolist() for n in (1, 19, 6)]
PROMPTS.append([*PROMPTS[1][:17], 7, 8])  # shares two pages with the one before
GREEDY = [Sampling(11)] * 4
MIXED = [
    Sampling(11, temperature=1.0, seed=1, logprobs=2),
    Sampling(9, temperature=0.7, top_p=0.9, seed=2),
    Sampling(11, frequency_penalty=1.0, presence_penalty=1.0),
    Sampling(10, temperature=1.0, top_k=9, seed=4, repetition_penalty=1.2),
]


@pytest.fixture(scope="module")
def engine(foreseeing):
    """Makes engines that share their compiled programs."""
    programs = set()

    def make(n_drafts, weights=foreseeing.weights, n_pages=9, **options):
        options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 9} | options
        made = Engine(foreseeing.definition, weights, 32, n_drafts=n_drafts, **options)
        made._pads_to_largest = True  # few programs
        programs.add(made.programs)
        made.ranks[0] = Rank(PagePool(n_pages, 8, look_ahead=n_drafts), options["n_rows"], options["chunk"])
        return made

    return make


def run(engine, samplings, prompts=PROMPTS):
    """Returns (requests, their new ids, the log-probabilities of these)."""
    requests = [engine.submit(*both) for both in zip(prompts, samplings, strict=True)]
    found = {request: ([], []) for request in requests}
    while not engine.is_idle:
        for output in engine.step():
            found[output.request][0].extend(output.ids)
            found[output.request][1].extend(output.logprobs)
        engine.ranks[0].pages.check(request.table for request in requests)
    assert engine.ranks[0].pages.n_free == engine.ranks[0].pages.n_pages - 1
    return requests, *([found[request][place] for request in requests] for place in (0, 1))


@pytest.fixture(scope="module")
def plain(engine):
    """What is drawn without drafts: greedily, and in other ways."""
    return run(engine(0), GREEDY), run(engine(0), MIXED)


SETTINGS = {
    "step by step": {},
    "several steps per program": {"n_steps": 4},
    "prompts in small parts, the host late": {"chunk": 4, "n_ahead": 2},
    "a small pool": {"n_pages": 6},
    "a small pool, several steps, the host late": {"n_pages": 6, "n_steps": 4, "n_ahead": 2},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_the_text_is_the_same(engine, foreseeing, plain, setting):
    made = engine(1, **SETTINGS[setting])
    requests, texts, _ = run(made, GREEDY)
    assert texts == plain[0][1]
    assert made.n_drafted > 0 and made.n_accepted < made.n_drafted
    assert (sum(request.n_preempted for request in requests) > 0) == ("a small pool" in setting)
    assert np.argmax(foreseeing.last_logits(PROMPTS[2])) == texts[2][0]


def test_the_host_looks_at_a_step_while_the_next_one_runs(engine, plain):
    """Though only the device knows where that one begins."""
    made = engine(1, n_steps=4)
    request = made.submit(PROMPTS[1], GREEDY[1])
    while not request.has_ended:
        made.step()
        assert request.has_ended or made._flight
    assert request.tokens == PROMPTS[1] + plain[0][1][1]


@pytest.fixture
def noted(monkeypatch):
    """A function that notes (pages, steps) of the programs with drafts that an engine runs from here on."""

    def note(made):
        speculate, found = made.calls.speculate, []

        def noting(plans, n_rows, width, kind, n_top, n_steps):
            found.append((width, n_steps))
            return speculate(plans, n_rows, width, kind, n_top, n_steps)

        monkeypatch.setattr(made.calls, "speculate", noting)
        return found

    return note


def test_where_programs_do_not_end_early_the_last_tokens_are_drawn_step_by_step(engine, plain, noted):
    """As on a GPU: several steps at a time while a row has as many tokens left as they could draw."""
    made = engine(1, n_steps=4, ends_early=False)
    found = noted(made)
    for n_new, first in ((11, 4), (9, 4), (8, 1)):
        assert run(made, [Sampling(n_new)], PROMPTS[:1])[1] == [plain[0][1][0][:n_new]]
        n_steps = [steps for _, steps in found]
        assert n_steps == [first] + [1] * (len(found) - 1)
        found.clear()
    assert run(made, [GREEDY[1], Sampling(8)], PROMPTS[1:3])[1] == [plain[0][1][1], plain[0][1][2][:8]]


def test_no_program_is_wider_than_a_request_at_its_last_position(engine, foreseeing, noted):
    """Also where the host knows only the most that there may be: none is needed but those that `compile` makes."""
    made = engine(1, n_steps=4)
    made._pads_to_largest = False
    found = noted(made)
    requests, _, _ = run(made, [Sampling(100)], PROMPTS[1:2])
    assert len(requests[0].tokens) == 32 and {width for width, _ in found} == {4} == set(made._sizes.widths)


def test_a_step_draws_no_more_than_the_engines_own(engine, plain):
    made, (_, texts, _) = engine(0, n_steps=2), plain[0]
    made.submit(PROMPTS[1], GREEDY[1])
    found = []
    while not made.is_idle:
        found += [output.ids for output in made.step(8)]
    assert list(itertools.chain(*found)) == texts[1] and max(map(len, found)) == 2


def test_a_step_is_repeated_until_no_row_runs_or_without_an_early_end_so_many_times(engine):
    def step(carry):
        return carry[0] + 1, carry[0] < 2

    for ends_early, expected in ((True, 3), (False, 8)):
        programs = engine(1, ends_early=ends_early).programs
        number, _ = programs._repeated(step, (jnp.int32(0), jnp.bool_(True)), 8)
        assert number == expected
        assert programs._repeated(lambda carry: (carry[0] + 1, True), (jnp.int32(0), jnp.bool_(True)), 8)[0] == 8


def test_a_row_that_has_stopped_draws_nothing_more(engine, plain):
    """Whether the host has seen the stop id or not."""
    stop, made = plain[0][1][1][2], engine(1, n_steps=4, n_ahead=2)
    drawn, run_program = [], made.programs.run

    def noting(call):
        found = run_program(call)
        if call.name == "speculate":
            drawn.append(np.asarray(found[0])[0].tolist())
        return found

    made.programs, programs = SimpleNamespace(run=noting), made.programs
    _, texts, _ = run(made, [Sampling(11, stop_ids=(stop,))], PROMPTS[1:2])
    made.programs = programs
    assert texts == [plain[0][1][1][:3]]
    assert [token for token in drawn[0] if token >= 0] == texts[0][1:]
    assert len(drawn) > 1 and all(token == speculation.ENDED for ids in drawn[1:] for token in ids)


@pytest.mark.slow
def test_the_text_is_the_same_at_any_temperature_and_with_penalties(engine, plain):
    _, texts, logprobs = run(engine(1), MIXED)
    assert texts == plain[1][1]
    assert [len(found) for found in logprobs] == [11, 0, 0, 0]
    for mine, other in zip(logprobs[0], plain[1][2][0], strict=True):
        assert abs(mine.logprob - other.logprob) < 1e-5
        assert [token for token, _ in mine.top] == [token for token, _ in other.top]


def test_a_stop_id_ends_a_text_and_a_cached_prompt_is_not_computed_again(engine, plain):
    stop = plain[0][1][1][3]
    made = engine(1)
    run(made, GREEDY[:1], PROMPTS[1:2])
    requests, texts, _ = run(made, [Sampling(11, stop_ids=(stop,)), Sampling(11)], [PROMPTS[1], PROMPTS[3]])
    assert texts == [plain[0][1][1][: plain[0][1][1].index(stop) + 1], plain[0][1][3]]
    assert [request.n_cached for request in requests] == [16, 16]


def forgetful(weights):
    """Weights of a model that knows the last token alone, so that multi-token prediction can say what it says."""
    params, bias = jax.tree.map(jnp.copy, weights)

    def silent(path, leaf):
        return jnp.zeros_like(leaf) if path[-1].key in ("out_HUD", "down_XFD", "down_FD") else leaf

    params = jax.tree_util.tree_map_with_path(silent, params)
    module, d_model = params["mtp"]["0"], params["final_norm"]["gain"].shape[0]
    module["embedding_norm"]["gain"] = jnp.ones(d_model)
    module["join_YD"] = jnp.eye(2 * d_model, d_model)
    module["final_norm"] = params["final_norm"]
    return params, bias


def test_drafts_of_a_model_that_foresees_itself_are_right(engine, foreseeing):
    """Greedy ones and those drawn at a temperature: the noise is that of the position, but for a row's first draft."""
    weights = forgetful(foreseeing.weights)
    samplings = [*GREEDY[:2], Sampling(11, temperature=1.0, seed=3), Sampling(10, temperature=1.5, seed=4)]
    made = engine(1, weights)
    assert run(made, samplings)[1] == run(engine(0, weights), samplings)[1]
    assert made.n_drafted == 20 and made.n_accepted == 18  # five steps each after the first token


def test_a_constrained_request_draws_what_is_allowed_beside_those_with_drafts(engine, plain):
    samplings = list(GREEDY)
    samplings[1] = Sampling(11, constraint=Ladder(1))
    texts = run(engine(1), samplings)[1]
    assert len(texts[1]) == 11 and all(b == 3 * a % 200 for a, b in itertools.pairwise(texts[1]))
    assert [texts[n] for n in (0, 2, 3)] == [plain[0][1][n] for n in (0, 2, 3)]


def test_devices_that_share_the_experts_give_the_same_text(foreseeing, plain):
    """Each keeps the places of its own rows."""
    mesh = make_mesh(1, 2, jax.devices()[:2])
    replicas = on_mesh.replicas(foreseeing.config, foreseeing.definition, foreseeing.weights, mesh)
    options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 9, "n_steps": 4, "n_drafts": 1}
    made = Engine(foreseeing.definition, replicas.place(foreseeing.weights), 32, replicas=replicas, **options)
    made._pads_to_largest = True  # few programs
    requests = [made.submit(*both) for both in zip(PROMPTS, GREEDY, strict=True)]
    while not made.is_idle:
        made.step()
    assert [request.tokens[len(request.prompt) :] for request in requests] == plain[0][1]
    assert {request.options.rank for request in requests} == {0, 1} and made.n_drafted > 0


def test_a_step_has_slots_for_the_draft_of_a_rows_last_token(engine, monkeypatch):
    """It reads them though it cannot keep the draft: kernels take a row's length from the last token of a step."""
    made, widths = engine(1, page_size=4, n_pages=17), []
    made._pads_to_largest = False
    request = made.submit([1] * 13, Sampling(8))

    def speculate(plans, n_rows, width, *_):
        widths.append(width)
        raise InterruptedError

    monkeypatch.setattr(made.calls, "speculate", speculate)
    for n_draws in (3, 4):  # the last token that is read is the last but one or the last of four pages
        with pytest.raises(InterruptedError):
            made._start_speculation([[Part(request, 12, 1, n_draws)]])
    assert made.least_pages <= 4 and widths == [4, 8]


def test_drafts_need_multi_token_prediction(network):
    with pytest.raises(UserError, match="the model has no multi-token prediction"):
        Engine(network.definition, network.weights, 32, n_drafts=1)


def test_a_head_in_fp8_makes_drafts_and_changes_no_text(engine, plain, monkeypatch):
    """As on Hopper, but for the kernel: each new set of weights has its own."""
    monkeypatch.setattr(speculation, "reads_codes", lambda model: True)
    made = engine(1, page_size=8, n_ahead=0)  # programs of its own
    made.programs = Programs(made.programs.definition, made.programs.sizes)
    coded = made.calls.coded_head
    assert coded.codes.shape == made.weights[0]["head"]["weight_DV"].shape[::-1]
    _, texts, _ = run(made, GREEDY[:2], PROMPTS[:2])
    assert texts == plain[0][1][:2] and made.n_drafted > 0
    made.replace_weights(jax.tree.map(lambda w: 2 * w, made.weights))
    np.testing.assert_array_equal(made.calls.coded_head.scale, 2 * coded.scale)


@pytest.mark.parametrize(
    ("kernel", "vocab_size", "d", "reads"),
    [
        ("mosaic_gpu", 192, 256, True),
        ("xla", 192, 256, False),
        ("mosaic_gpu", 200, 256, False),
        ("mosaic_gpu", 192, 64, False),
    ],
)
def test_a_head_in_fp8_is_for_a_kernel_and_what_it_takes(kernel, vocab_size, d, reads):
    embedding = SimpleNamespace(table_VD=np.zeros((vocab_size, d)))
    model = SimpleNamespace(embedding=embedding, run=SimpleNamespace(kernels=Kernels(coded_matmul=kernel)))
    assert speculation.reads_codes(model) == reads


def test_drafts_are_those_of_the_head_in_fp8(foreseeing):
    """Not of the model's own: here of one whose tokens are in another order."""
    own = speculation.head_in_codes(foreseeing.weights[0]["head"]["weight_DV"])
    head = dataclasses.replace(own, codes=jnp.roll(own.codes, 7, axis=0))
    h_B1D = DRAW.normal(size=(3, 1, head.shape[0])).astype(np.float32)

    @jax.jit
    def drafted(params, router_bias, head):
        model = bind(foreseeing.definition, params, router_bias)
        return speculation._draft(model, h_B1D, jnp.zeros(3, jnp.int32), None, None, {}, head)

    by_own, by_other = (jax.device_get(drafted(*foreseeing.weights, one)) for one in (None, head))
    expected = np.argmax(h_B1D[:, 0] @ np.asarray(head.astype(jnp.float32)), axis=1)
    np.testing.assert_array_equal(by_other, expected)
    assert np.all(by_own != by_other)


def test_after_its_attention_multi_token_prediction_is_of_one_token(foreseeing):
    """With its hidden state, and the same cache, as if it were of all tokens."""
    tokens = Tokens.of(jnp.asarray([PROMPTS[2], PROMPTS[3][:6]]))
    place_B = jnp.asarray([1, 4])

    @jax.jit
    def both(params, router_bias):
        model = bind(foreseeing.definition, params, router_bias)
        h_BTD, _ = model.hidden(tokens)
        return [model.ahead(h_BTD, tokens, first_pass(8), None, place) for place in (None, place_B)]

    (h_BTD, cached), (h_B1D, same) = both(*foreseeing.weights)
    np.testing.assert_allclose(h_B1D, at(h_BTD, place_B), rtol=1e-5, atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, cached, same)

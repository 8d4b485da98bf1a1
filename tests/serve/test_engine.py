"""Every way to run gives the text that a forward pass over the whole sequence gives."""

import itertools
import math
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest

from deepseek_jax import on_mesh
from deepseek_jax.abstract_model import abstract_module
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import split
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.serve import batches
from deepseek_jax.serve.engine import Engine, Sampling
from deepseek_jax.serve.loads import ExpertLoads
from deepseek_jax.serve.offline import outputs
from deepseek_jax.serve.programs import programs_for
from deepseek_jax.serve.scheduler import Part

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


def run(engine, samplings, prompts=PROMPTS, later=()):
    """Submits prompts, some of them `later` after as many steps; returns their new ids."""
    requests, texts, n_steps = [], {}, 0
    queue = [(later[i] if later else 0, prompt) for i, prompt in enumerate(prompts)]
    while queue or not engine.is_idle:
        while queue and queue[0][0] <= n_steps:
            requests.append(engine.submit(queue.pop(0)[1], samplings[len(requests)]))
        for request, ids, ending, *_ in engine.step():
            texts.setdefault(request, []).extend(ids)
            if ending:
                texts[request].append(ending)
        for number, rank in enumerate(engine.ranks):
            rank.pages.check(request.table for request in requests if request.options.rank == number)
        n_steps += 1
        assert n_steps < 1000
    return requests, [texts[request] for request in requests]


def all_free(engine):
    return all(rank.pages.n_free == rank.pages.n_pages - 1 for rank in engine.ranks)


SETTINGS = {
    "as it comes": {"is_padded": False},
    "prompts in small parts": {"chunk": 4},
    "prompts together": {"n_prompts": 4, "chunk": 12},
    "a pool that is too small": {"n_pages": 8},
    "the host looks at once": {"n_ahead": 0},
    "the host looks late": {"n_ahead": 3},
    "several tokens per step": {"n_steps": 8},
    "several tokens per step, in a small pool": {"n_steps": 8, "n_pages": 8, "n_ahead": 0, "ends_early": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_greedy_text_is_that_of_the_forward_pass(engine, alone, setting):
    made = engine(**SETTINGS[setting])
    requests, texts = run(made, [Sampling(10)] * len(PROMPTS))
    assert texts == [[*ids, "length"] for ids in alone]
    assert (sum(request.n_preempted for request in requests) > 0) == (made.ranks[0].pages.n_pages == 8)
    assert all_free(made)


def test_draws_do_not_depend_on_company(engine, alone):
    samplings = [Sampling(10, temperature=1.0 + i / 10, top_p=1.0 - i / 20, seed=i) for i in range(len(PROMPTS))]
    samplings[2] = Sampling(10)  # greedy among those that draw
    texts = run(engine(n_pages=8, n_ahead=2), samplings)[1]
    assert run(engine(chunk=4), samplings, later=[0, 0, 1, 5, 5, 9, 12])[1] == texts
    assert run(engine(n_steps=8, ends_early=False), samplings)[1] == texts
    others = [*samplings[:3], *(replace(one, seed=one.seed + 50) for one in samplings[3:])]
    changed = run(engine(), others)[1]
    assert changed[:3] == texts[:3] and all(a != b for a, b in zip(changed[3:], texts[3:], strict=True))
    assert texts[2] == [*alone[2], "length"]
    assert len({tuple(text) for text in texts}) == len(texts)


def test_a_stop_id_ends_a_text_and_its_pages_are_free(engine, alone):
    stop = alone[3][4]
    made = engine()
    requests, texts = run(made, [Sampling(10, stop_ids=(stop,))] * len(PROMPTS))
    assert texts[3] == [*alone[3][: alone[3].index(stop) + 1], "stop"]
    assert all(request.has_ended for request in requests)
    assert all_free(made)


def test_stop_ids_are_recognised_on_the_device(engine, alone):
    """A row computes nothing after its stop id; the others continue."""
    stop = alone[3][2]
    made, shown, output = engine(n_steps=8), [], None
    output = made._output
    made._output = lambda found: shown.append(np.asarray(found.id_BT)[found.row]) or output(found)
    samplings = [Sampling(10), Sampling(10, stop_ids=(stop,))]
    texts = run(made, samplings, [PROMPTS[1], PROMPTS[3]])[1]
    assert texts == [[*alone[1], "length"], [*alone[3][:3], "stop"]]
    assert [ids.tolist() for ids in shown if len(ids) == 8][:2] == [alone[1][1:9], [*alone[3][1:3], *[-1] * 6]]


SHAPES = [
    {"logit_bias": {3: 2.0, 7: -100.0}},
    {"presence_penalty": 1.5},
    {"frequency_penalty": 0.7, "repetition_penalty": 1.3},
    {"repetition_penalty": 1.5, "logit_bias": {20: 1.0}},
]


def expected(network, prompt, n, presence_penalty=0, frequency_penalty=0, repetition_penalty=1, logit_bias=()):
    """The greedy continuation by full forward passes and the formulas."""
    ids = list(prompt)
    for _ in range(n):
        logits = network.last_logits(ids).astype(np.float64)
        for token, bias in dict(logit_bias).items():
            logits[token] += bias
        for token in set(ids):
            logits[token] *= 1 / repetition_penalty if logits[token] > 0 else repetition_penalty
        for token in ids[len(prompt) :]:
            logits[token] -= frequency_penalty
        for token in set(ids[len(prompt) :]):
            logits[token] -= presence_penalty
        ids.append(int(np.argmax(logits)))
    return ids[len(prompt) :]


def test_biases_and_penalties_are_those_of_the_formulas(engine, network, alone):
    """Also where a request was preempted, several tokens are drawn per step, and greedy rows are in the batch."""
    texts = [
        [*expected(network, prompt, 10, **shape), "length"] for prompt, shape in zip(PROMPTS, SHAPES, strict=False)
    ]
    texts += [[*ids, "length"] for ids in alone[4:]]
    samplings = [*(Sampling(10, **shape) for shape in SHAPES), *[Sampling(10)] * 3]
    assert run(engine(), samplings)[1] == texts
    assert run(engine(n_steps=8), samplings[:3], PROMPTS[:3])[1] == texts[:3]
    requests, found = run(engine(n_pages=8), samplings)
    assert found == texts and sum(request.n_preempted for request in requests)
    assert [texts[i][:-1] != alone[i] for i in range(4)] == [True] * 4


def logprobs_of(network, ids, place):
    """The log-probabilities of all tokens at one place of a sequence, by a forward pass."""
    logits = network.last_logits(ids[:place]).astype(np.float64)
    return logits - np.log(np.exp(logits).sum())


@pytest.mark.parametrize("options", [{}, {"n_steps": 8, "chunk": 4}], ids=["", "several tokens per step, small parts"])
def test_log_probabilities_are_those_of_the_forward_pass(engine, network, options):
    """Of the model's own distribution, whatever tokens are drawn from; of a prompt also where the cache has it."""
    made, outputs = engine(**options), {}
    shaped = Sampling(6, temperature=0.7, top_k=5, logit_bias={3: 4.0}, logprobs=3, prompt_logprobs=True)
    samplings = {made.submit(PROMPTS[5], Sampling(3)): 5}
    while not made.is_idle:
        made.step()
    samplings = {made.submit(PROMPTS[5], shaped): 5, made.submit(PROMPTS[0], Sampling(6, logprobs=0)): 0}
    samplings |= {made.submit(PROMPTS[0], shaped): 0, made.submit(PROMPTS[1], Sampling(6)): 1}
    while not made.is_idle:
        for output in made.step():
            outputs.setdefault(output.request, []).append(output)
    for request, number in samplings.items():
        sampling, prompt = request.options.sampling, PROMPTS[number]
        found = [one for output in outputs[request] for one in output.logprobs]
        assert len(found) == (6 if sampling.logprobs is not None else 0)
        places = list(enumerate(found, len(prompt)))
        if sampling.prompt_logprobs:
            assert request.n_cached == 0
            of_prompt = outputs[request][0].prompt_logprobs
            assert of_prompt[0] is None and len(of_prompt) == len(prompt)
            places += list(enumerate(of_prompt))[1:]
        assert not any(output.prompt_logprobs for output in outputs[request][1:])
        for place, (logprob, top) in places:
            logprobs_V = logprobs_of(network, request.tokens, place)
            assert abs(logprob - logprobs_V[request.tokens[place]]) < 1e-5
            best = np.argsort(-logprobs_V)[: sampling.logprobs]
            assert [token for token, _ in top] == best.tolist()
            np.testing.assert_allclose([value for _, value in top], logprobs_V[best], atol=1e-5)


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
    request = made.submit(PROMPTS[5], Sampling(10))
    while not request.tokens[20:]:
        made.step()
    made.replace_weights(network.weights)  # while a request runs
    while not made.is_idle:
        made.step()
    for n_cached in (0, 16):
        requests, texts = run(made, [Sampling(10)], PROMPTS[5:6])
        assert (requests[0].n_cached, texts) == (n_cached, [[*alone[5], "length"]])
    found = [run(made, [Sampling(1)], [request.tokens])[0][0].n_cached for _ in range(2)]
    assert found == [16, 24]  # the third page of the request was made of two old ones


def test_a_cancelled_request_says_no_more_and_disturbs_nobody(engine, alone):
    made = engine()
    requests = [made.submit(prompt, Sampling(10)) for prompt in PROMPTS[:4]]
    texts = {request: [] for request in requests}
    for number in range(40):
        if number == 3:
            made.cancel(requests[1])
            made.cancel(requests[3])
        for request, ids, *_ in made.step():
            assert number < 3 or request in (requests[0], requests[2])
            texts[request] += ids
    assert made.is_idle and all_free(made)
    assert [texts[requests[0]], texts[requests[2]]] == [alone[0], alone[2]]


def waits(request, made):
    return request in made.ranks[0].scheduler.waiting


CANCELLED = {  # (settings, prompts, what is true of the last request when it is cancelled)
    "it waits for a row": ({}, [3, 1, 2, 4, 0], waits),
    "its prompt is half computed": ({"chunk": 4}, [3, 5], lambda one, _: 0 < one.n_computed < 20),
    "it was preempted": ({"n_pages": 7}, [2, 5, 2, 5], lambda one, made: one.n_preempted and waits(one, made)),
    "its last token is on the device": ({"n_ahead": 2}, [3, 1], lambda one, _: one.n_tokens == one.n_positions),
    "its steps run ahead": ({"n_steps": 4, "n_ahead": 2}, [3, 1], lambda one, _: one.n_tokens > 8),
}


@pytest.mark.parametrize("when", CANCELLED)
def test_a_request_may_be_cancelled_at_any_time(engine, alone, when):
    """The last one is; it says no more, its pages are free, and the others say what they say alone."""
    settings, numbers, is_time = CANCELLED[when]
    made, texts = engine(**settings), {}
    *others, last = [made.submit(PROMPTS[number], Sampling(10)) for number in numbers]
    while not made.is_idle:
        if not last.has_ended and is_time(last, made):
            made.cancel(last)
        for request, ids, *_ in made.step():
            assert request is not last or not last.has_ended
            texts.setdefault(request, []).extend(ids)
    assert [texts[request] for request in others] == [alone[number] for number in numbers[:-1]]
    assert last.has_ended and len(texts.get(last, [])) < 10 and all_free(made)


def test_after_compile_no_request_compiles(engine, monkeypatch, compilations):
    made, needed = engine(is_padded=False), []
    compile_all = made.programs.compile
    monkeypatch.setattr(
        made.programs, "compile", lambda calls, *more: compile_all(calls, *more) or needed.extend(calls)
    )
    made.compile()
    # one, two or four rows, first and later parts of 16 tokens (32 positions are four pages); three kinds of drawing
    # for as many rows; log-probabilities of one, two or four rows and of 16 tokens, without and with the likeliest
    assert len(needed) == 5 + 9 + 8
    n_programs = len(made.programs)
    compilations.clear()
    run(made, [Sampling(10, temperature=1.0, seed=3)] * len(PROMPTS), [[1 + i for i in p] for p in PROMPTS])
    run(made, [Sampling(10, top_k=9, logprobs=i % 4, prompt_logprobs=True) for i in range(7)])
    run(made, [Sampling(5, logit_bias={3: 1.0}), Sampling(9), Sampling(7, constraint=Ladder(2))], PROMPTS[1:4])
    run(made, [Sampling(10)] * len(PROMPTS))
    run(made, [Sampling(1)], [[5]])
    run(made, [Sampling(31)], [[5]])
    assert len(made.programs) == n_programs and not compilations
    jax.jit(lambda x: x + 1).lower(1.0).compile()
    assert len(compilations) == 1, "the law above would hold for no events"


def test_until_all_programs_are_there_requests_run_in_the_largest(engine, alone, monkeypatch):
    """Which are few; the text is the same."""
    made, needed, ran, stopped = engine(), [], [], threading.Event()
    compile_all, run_one = made.programs.compile, made.programs.run
    monkeypatch.setattr(
        made.programs, "compile", lambda calls, *more: compile_all(calls, *more) or needed.append(len(calls))
    )
    monkeypatch.setattr(made.programs, "run", lambda call: ran.append(call) or run_one(call))

    def rows_of_a_step():
        ran.clear()
        assert run(made, [Sampling(3)], PROMPTS[3:4])[1] == [[*alone[3][:3], "length"]]
        return {len(call.rows["current"].slot_B) for call in ran if call.name == "decode"}

    made.compile_largest()
    assert rows_of_a_step() == {4}
    stopped.set()
    made.compile(stopped)  # too late
    assert rows_of_a_step() == {4}
    made.compile(threading.Event())
    assert rows_of_a_step() == {1} and needed == [15, 22, 22]


def test_engines_of_the_same_network_and_sizes_share_their_programs(engine, network):
    """Also those of networks that are equal, but not those of other sizes, precisions or weights in other dtypes."""
    shared, (definition, *_) = engine().programs, split(abstract_module(network.config))
    weights, sizes = network.weights, shared.sizes
    assert definition is not network.definition
    assert engine(n_steps=8).programs is programs_for(definition, weights, sizes) is shared
    halves = jax.tree.map(lambda w: w.astype("bfloat16"), weights)
    others = [programs_for(definition, weights, sizes._replace(n_rows=2)), programs_for(definition, halves, sizes)]
    others.append(programs_for(definition, weights, sizes, matmul_precision="highest"))
    assert len({shared, *others}) == 4


def test_the_host_looks_at_a_step_while_the_next_one_runs(engine, alone):
    """With a step ahead the first call gives nothing; `step` draws as many tokens as it is asked to."""
    made = engine(n_steps=8)
    made.submit(PROMPTS[3], Sampling(10))
    found = [[token for output in made.step(n) for token in output.ids] for n in (None, 1, 3, None, None)]
    assert found == [[], *(alone[3][start:end] for start, end in ((0, 1), (1, 2), (2, 5), (5, 10)))]
    assert made.is_idle


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
    assert (engine(n_pages=3).most_positions, engine().most_positions) == (16, 32)
    with pytest.raises(UserError, match="the cache holds 16 tokens"):
        engine(n_pages=3).submit([1] * 16, Sampling(4))
    with pytest.raises(UserError, match="a prompt with ids from -1 to 5: expected 0 to"):
        engine().submit([5, -1], Sampling(4))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"temperature": float("nan")}, "temperature=nan: expected a number from 0"),
        ({"top_p": 1.5}, "top_p=1.5: expected a number from 0 to 1"),
        ({"top_k": -1}, "top_k=-1: expected a whole number"),
        ({"repetition_penalty": 0.0}, "repetition_penalty=0.0: expected a number above 0"),
        ({"logprobs": 21}, "logprobs=21: expected None or a whole number from 0 to 20"),
        ({"prompt_logprobs": True}, "prompt_logprobs without logprobs"),
        ({"logit_bias": {10**6: 1.0}}, "an id of logit_bias=1000000"),
        ({"logit_bias": {1: float("inf")}}, "logit_bias of 1=inf"),
        ({"logit_bias": dict.fromkeys(range(301), 1.0)}, "logit_bias of 301 tokens: expected 300 or fewer"),
    ],
)
def test_settings_out_of_range_are_refused(setting, message):
    with pytest.raises(UserError, match=message):
        Sampling(4, **setting).check(1000)


def test_the_least_pages_of_a_program_are_a_power_of_two(engine):
    with pytest.raises(UserError, match="least_pages=3: expected a power of two. Choose 4."):
        engine(least_pages=3)


@pytest.mark.slow
def test_requests_end_with_the_reader_of_their_outputs(engine):
    made = engine()
    reader = outputs(made, [([5, 6, 7], Sampling(9))] * 9)
    number, output = next(reader)
    assert number in range(9) and len(output.ids) == 1 and not made.is_idle
    reader.close()
    assert made.is_idle
    assert len({number for number, output in outputs(made, [([5, 6, 7], Sampling(2))] * 9)}) == 9


@pytest.mark.slow
def test_replicas_of_busy_experts_change_no_text(network, engine, alone):
    """Where they go follows from the loads that an engine has counted; new weights get replicas as well."""
    mesh, busy = make_mesh(1, 2, jax.devices()[:2]), ExpertLoads(engine())
    busy.note(PROMPTS[5])
    busy.measure()
    (load_LE,) = busy.counts.values()
    redundant = on_mesh.Redundant(2, busy.counts)
    replicas = on_mesh.replicas(network.config, network.definition, network.weights, mesh, redundant)
    options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 6, "replicas": replicas}
    definition = on_mesh.with_slots(network.config, network.definition, network.weights, redundant)
    made = Engine(definition, replicas.place(network.weights), 32, **options)
    made._pads_to_largest = True  # few programs
    experts = made.weights[0]["moe_blocks"]["experts"]["gate_XDF"]
    assert experts.shape[1] == 8 + 2 and experts.addressable_shards[0].data.shape[1] == 5
    slots = np.asarray(made.weights[1]["moe_blocks"]["experts"]["slot_ER"])
    for load_E, slot_ER in zip(load_LE, slots, strict=True):
        assert (slot_ER[load_E.argmax()] >= 0).sum() > 1, "the busiest expert has a replica"
    assert run(made, [Sampling(10)] * len(PROMPTS))[1] == [[*ids, "length"] for ids in alone]
    of_others = replace(redundant, loads={name: load_LE[:, :4] for name, load_LE in busy.counts.items()})
    with pytest.raises(
        UserError, match=r"loads of moe_blocks of shape \(2, 4\): expected \(2, 8\), layers and experts"
    ):
        on_mesh.replicas(network.config, network.definition, network.weights, mesh, of_others)
    with pytest.raises(UserError, match="3 redundant experts for tiny_v3 over 2 devices"):
        on_mesh.replicas(network.config, network.definition, network.weights, mesh, replace(redundant, n=3))


@pytest.mark.parametrize(
    "sizes",
    [
        pytest.param((2, 2), marks=pytest.mark.slow, id="four devices"),
        pytest.param((1, 2), marks=pytest.mark.matrix, id="two devices"),
    ],
)
def test_devices_that_share_the_experts_give_the_same_text(network, engine, alone, sizes):
    """Each has requests of its own, at first as many as it has rows or more, and at the end fewer than others.

    Greedy, drawn at a temperature, and constrained.
    """
    mesh = make_mesh(*sizes, jax.devices()[: math.prod(sizes)])
    definition, weights = network.definition, network.weights
    replicas = on_mesh.replicas(network.config, definition, weights, mesh)
    options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 6, "replicas": replicas}
    made = Engine(definition, replicas.place(weights), 32, **options)
    made._pads_to_largest = True  # few programs
    experts = made.weights[0]["moe_blocks"]["experts"]["gate_XDF"]
    assert experts.addressable_shards[0].data.shape[1] == experts.shape[1] // 2
    samplings = [Sampling(10)] * len(PROMPTS) + [Sampling(10, logprobs=0)]
    requests, texts = run(made, samplings, [*PROMPTS, PROMPTS[3]])
    assert texts == [[*ids, "length"] for ids in [*alone, alone[3]]]
    assert {request.options.rank for request in requests} == set(range(math.prod(sizes))) and all_free(made)

    def drawn():
        found = [Sampling(8, temperature=1.0 + i / 10, top_p=0.9, seed=i) for i in range(4)]
        return [*found, Sampling(8, constraint=Ladder(1)), Sampling(8, temperature=1.5, seed=3, constraint=Ladder(4))]

    assert run(made, drawn(), PROMPTS[:6])[1] == run(engine(), drawn(), PROMPTS[:6])[1] and all_free(made)


def test_replicas_of_experts_whose_loads_are_not_given_are_refused(network):
    mesh = make_mesh(1, 2, jax.devices()[:2])
    with pytest.raises(UserError, match="loads of blocks: expected those of moe_blocks"):
        redundant = on_mesh.Redundant(2, {"blocks": np.ones((1, 8))})
        on_mesh.replicas(network.config, network.definition, network.weights, mesh, redundant)


def test_engines_with_the_same_programs_keep_their_own_replicas(network):
    """Both place new weights by their own loads; nothing runs."""
    mesh, made = make_mesh(1, 2, jax.devices()[:2]), []
    for busiest in (0, 5):
        load_LE = np.ones((1, 8)) + 9 * (np.arange(8) == busiest)
        redundant = on_mesh.Redundant(2, {"moe_blocks": np.repeat(load_LE, 2, axis=0)})
        assert redundant != replace(redundant)
        replicas = on_mesh.replicas(network.config, network.definition, network.weights, mesh, redundant)
        definition = on_mesh.with_slots(network.config, network.definition, network.weights, redundant)
        weights = replicas.place(network.weights)
        options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 6, "replicas": replicas}
        made.append(Engine(definition, weights, 32, **options))
        slot_ER = np.asarray(made[-1].replicas.place(network.weights)[1]["moe_blocks"]["experts"]["slot_ER"])[0]
        assert (slot_ER[busiest] >= 0).sum() > 1
    assert made[0].programs is made[1].programs and made[0].replicas is not made[1].replicas


def test_weights_of_another_dtype_are_not_taken_by_an_engine(engine, network):
    made = engine()
    with pytest.raises(UserError, match="weights of other names, shapes, dtypes"):
        made.replace_weights(jax.tree.map(lambda w: w.astype(np.float16), network.weights))


def test_prompts_of_one_padded_length_are_computed_together():
    """A long one is by itself; a part that continues a prompt does not go before what it may read."""
    lengths = (10, 1900, 9, 16, 1100, 17)
    parts = [Part(None, 0, n, 0) for n in lengths] + [Part(None, 64, n, 0) for n in (9, 12, 40, 9)]
    groups = batches.together(parts, 3, lambda part: False)
    assert [[(part.start, part.n_tokens) for part in group] for group in groups] == [
        [(0, 10), (0, 9), (0, 16)], [(0, 1900), (0, 1100)], [(0, 17)], [(64, 9), (64, 12)], [(64, 40)], [(64, 9)],
    ]  # fmt: skip
    assert len(batches.together(parts[:3], 1, lambda part: False)) == 3


def test_a_mesh_that_divides_more_than_rows_and_experts_is_refused(network):
    mesh = make_mesh(1, 1, jax.devices()[:2], pipe=2)
    with pytest.raises(UserError, match="generation divides rows over data and expert"):
        on_mesh.replicas(network.config, network.definition, network.weights, mesh)

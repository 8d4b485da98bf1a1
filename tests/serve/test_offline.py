"""Many prompts at once: ids in; ids, log-probabilities and routes out."""

import jax
import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax import run_config
from deepseek_jax.abstract_model import run_as, with_routes
from deepseek_jax.errors import UserError
from deepseek_jax.layers.base import bind, split
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.serve.engine import Engine, Sampling
from deepseek_jax.serve.offline import complete, outputs
from tests.serve.conftest import SIZES, Network

pytestmark = pytest.mark.slow  # every engine compiles programs of its own
DRAW = np.random.default_rng(5)
PROMPTS = [DRAW.integers(0, 200, n).tolist() for n in (2, 19, 7)]
PROMPTS.append([*PROMPTS[1][:17], 5])


@pytest.fixture(scope="module")
def foreseeing():
    """A network with a dense layer, two with experts, and multi-token prediction."""
    config = run_config.load("tiny_v3")
    config.model.update(SIZES | {"mtp_depth": 1})
    return Network(config)


@pytest.fixture(scope="module")
def with_experts(foreseeing):
    """The network as one that notes routes, and the routes of a sequence by a forward pass."""
    run = with_routes(foreseeing.config, bind(foreseeing.definition, *foreseeing.weights).run)
    definition = split(run_as(foreseeing.config, run))[0]

    @jax.jit
    def statistics(ids_BT):
        return bind(definition, *foreseeing.weights).hidden(Tokens.of(ids_BT))[1]["moe_blocks"].routes_BTK

    def routes(ids):
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(ids)] = ids
        return np.moveaxis(np.asarray(statistics(padded))[:, 0, : len(ids)], 0, 1)

    return definition, routes


@pytest.mark.parametrize("options", [{}, {"n_drafts": 1}], ids=["", "with drafts"])
def test_routes_are_those_of_the_forward_pass(foreseeing, with_experts, options):
    """Of the prompt, also where the cache had it, and of all new tokens but the last, which no block has read."""
    definition, routes = with_experts
    options = {"page_size": 8, "n_rows": 2, "chunk": 16, "n_pages": 9, "n_steps": 4} | options
    engine = Engine(definition, foreseeing.weights, 32, **options)
    engine._pads_to_largest = True  # few programs
    found = [*complete(engine, PROMPTS[:3], [Sampling(9)] * 3), *complete(engine, PROMPTS[3:], [Sampling(6)])]
    assert found[3].n_cached == 16
    for prompt, one in zip(PROMPTS, found, strict=True):
        ids = [*prompt, *one.ids]
        assert one.routes.dtype == np.int16 and one.routes.shape == (len(ids) - 1, 2, 2)
        expected = routes(ids)[: len(ids) - 1]
        assert (np.sort(one.routes, axis=-1) == np.sort(expected, axis=-1)).all()


@pytest.fixture(scope="module")
def model():
    config = run_config.load("tiny_v1")
    config.model.update({"n_layers": 1, "d_model": 16, "dense_width": 16})
    return dsj.build(config)


def test_a_model_serves_prompts_as_it_generates_them_alone(model):
    prompts = [[5, 6, 7], [9], [11, 12, 13, 14]]
    options = {"n_rows": 2, "n_pages": 5, "chunk": 16}
    sampling = Sampling(6, logprobs=0, prompt_logprobs=True)
    found = model.serve(prompts, sampling, **options)
    assert [one.ids for one in found] == model.generate(prompts, 6, stop_ids=())
    logprobs = np.asarray(jax.nn.log_softmax(model([[*prompts[2], *found[2].ids]])[0]))
    scores = [*found[2].prompt_logprobs[1:], *found[2].logprobs]
    ids = [*prompts[2], *found[2].ids][1:]
    np.testing.assert_allclose([one.logprob for one in scores], logprobs[np.arange(9), ids], atol=1e-5)

    engine = model._kept["serve"].engine
    n_programs = len(engine.programs)
    before, table = model.params["head"]["weight_DV"], np.array(model.params["head"]["weight_DV"])
    model.params["head"]["weight_DV"] = jax.numpy.asarray(table[:, ::-1])
    changed = model.serve(prompts, sampling, **options)
    assert [one.ids for one in changed] == model.generate(prompts, 6, stop_ids=()) != [one.ids for one in found]
    assert model._kept["serve"].engine is engine and len(engine.programs) == n_programs
    model.params["head"]["weight_DV"] = before


def test_after_an_interrupt_it_serves_again(model, monkeypatch):
    prompts, options = [[5, 6, 7], [9]], {"n_rows": 2, "n_pages": 5, "chunk": 16}
    expected = [one.ids for one in model.serve(prompts, Sampling(4), **options)]
    engine, waits = model._kept["serve"].engine, iter([True])
    seen = engine._seen

    def interrupted(step):
        if next(waits, False):
            raise KeyboardInterrupt
        return seen(step)

    monkeypatch.setattr(engine, "_seen", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.serve(prompts, Sampling(4), **options)
    assert [one.ids for one in model.serve(prompts, Sampling(4), **options)] == expected


def test_what_cannot_be_served_is_refused(model):
    options = {"n_rows": 2, "n_pages": 5, "chunk": 16}
    with pytest.raises(UserError, match="ids from 3 to 1000000"):
        model.serve([[3], [3, 10**6]], Sampling(2), **options)
    assert model._kept["serve"].engine.is_idle
    with pytest.raises(UserError, match="2 prompts with 1 samplings"):
        model.serve([[3], [4]], [Sampling(2)], **options)
    with pytest.raises(UserError, match="has no routed experts"):
        model.engine(routes=True)
    with pytest.raises(UserError, match="cache='fp8' for keys and values of heads"):
        model.engine(cache="fp8")
    engine = model._kept["serve"].engine
    engine.submit([3], Sampling(2))
    with pytest.raises(UserError, match="has requests already"):
        complete(engine, [[3]], [Sampling(2)])
    with pytest.raises(UserError, match="has requests already"):
        next(outputs(engine, [([3], Sampling(2))]))
    assert len(model.serve([[3]], Sampling(2), **options)[0].ids) == 2  # by another engine

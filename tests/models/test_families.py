"""Laws that hold of every family, on its tiny twin made smaller; published counts; what each refuses."""

import dataclasses
import functools
import importlib
import re
from typing import get_type_hints

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax import run, run_config, saved_config
from deepseek_jax.abstract_model import abstract_module, count_parameters, module
from deepseek_jax.convert import names
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.launch import plan
from deepseek_jax.layers.base import bind, decayed, logical_axes, split
from deepseek_jax.models import FAMILIES, family
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.sharding import is_axes
from deepseek_jax.train.loss import Totals, losses
from deepseek_jax.tree import paths

B, T, SLOTS = 2, 12, 14


def config_of(name: str):
    return importlib.import_module(f"deepseek_jax.configs.{name}").get_config()


@functools.cache
def abstract_of(name: str):
    return abstract_module(config_of(name))


def smaller(config):
    """A tiny twin with two layers of width 32 and the mechanisms that only larger models have."""
    m = config.model
    m.vocab_size, m.d_model, m.n_layers, m.dense_width = 64, 32, 2, 48
    for key, value in {"n_experts": 8, "expert_width": 16, "top_k": 2, "q_rank": 16, "kv_rank": 16}.items():
        if m.get(key):
            m[key] = value
    return config


def qwen_coder():
    """Biases as in Qwen's attention, and rotary embeddings as in DeepSeek Coder."""
    config = smaller(config_of("tiny_v1"))
    config.model.attention_bias, config.model.rope_factor = True, 4.0
    return config


def llama():
    config = smaller(config_of("tiny_v1"))
    config.model.rope_llama3 = config_of("r1_distill_llama_8b").model.rope_llama3
    config.model.rope_llama3.original_length = 8
    return config


def experts_alone(name: str):
    """One layer: those of the first layer are in the other cases."""
    config = smaller(config_of(name))
    config.model.n_layers, config.model.n_dense_layers = 1, 0
    return config


CASES = {
    "tiny_moe": functools.partial(experts_alone, "tiny_moe"),
    "tiny_v2": lambda: smaller(config_of("tiny_v2")),
    "tiny_v2_lite": functools.partial(experts_alone, "tiny_v2_lite"),
    "qwen_coder": qwen_coder,
    "llama": llama,
}


@pytest.mark.parametrize("name", ["tiny_v1", "tiny_v32", "tiny_v4"])
def test_without_initialisers_a_model_has_the_same_shapes(name):
    whole = split(nnx.eval_shape(lambda: module(config_of(name), jax.random.key(0))))
    assert split(abstract_of(name)) == whole


SLOW = ("tiny_v2_lite",)  # V2 with whole queries
RUNS = [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in CASES]


@pytest.fixture(scope="module", params=RUNS)
def model(request, filled) -> tuple:
    config = CASES[request.param]()
    module = family(config.family)
    sizes = module.Config.from_config(config.model)
    return filled(lambda: module.Model(sizes, rngs=nnx.Rngs(0)), std=0.15)


@pytest.fixture(scope="module")
def ids() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 64, (B, T + 1)).astype(np.int32)


@pytest.fixture(scope="module")
def forward(model):
    definition, params, bias = model
    return functools.partial(jax.jit(lambda params, ids_BT: bind(definition, params, bias)(ids_BT)), params)


def test_prefill_and_decode_are_the_full_forward(model, forward, ids):
    definition, params, bias = model

    @jax.jit
    def prefill(params, ids_BT):
        m = bind(definition, params, bias)
        h_BTD, cache = m.prefill(ids_BT, SLOTS)
        return m.head(h_BTD), cache

    decode = jax.jit(lambda params, *args: bind(definition, params, bias).decode(*args))
    expected = np.asarray(forward(ids[:, :T]))
    assert np.std(expected) > 0.1
    got, cache = prefill(params, ids[:, :T])
    np.testing.assert_allclose(got, expected, atol=1e-5)
    start = 8
    cache = jax.tree.map(np.array, cache)
    for part in jax.tree.leaves(cache):
        part[:, :, start:] = 50.0  # must be overwritten before it is seen
    for at in range(start, T):
        positions_BT = np.full((B, 1), at, np.int32)
        got, cache = decode(params, ids[:, at : at + 1], positions_BT, cache)
        np.testing.assert_allclose(got[:, 0], expected[:, at], atol=1e-5)


def test_no_logit_depends_on_a_later_token(forward, ids):
    changed, other = 5, ids[:, :T].copy()
    other[:, changed] = (other[:, changed] + 1) % 64
    before, after = (np.asarray(forward(given)) for given in (ids[:, :T], other))
    np.testing.assert_array_equal(before[:, :changed], after[:, :changed])
    assert np.abs(before[:, changed] - after[:, changed]).max() > 1e-4


def test_every_weight_learns_and_the_balance_losses_count(model, ids):
    definition, params, bias = model
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones_like(positions)
    batch = Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))
    alphas = {"expert_balance": 0.1, "device_balance": 0.2, "communication_balance": 0.3}

    def loss(params):
        m = bind(definition, params, bias)
        found = losses(m, batch, Totals(B * T, B), chunk=8, mask=True)
        return found.weighted(0.0, {name: alphas[name] for name in found.auxiliary}), found

    gradients, found = jax.device_get(jax.jit(jax.grad(loss, has_aux=True))(params))
    for path, gradient in jax.tree_util.tree_leaves_with_path(gradients):
        assert np.any(gradient), f"{jax.tree_util.keystr(path)} gets no gradient"
    assert bias == {} and (found.loads == {}) == ("moe_blocks" not in params)
    if "moe_blocks" in params:
        assert float(found.loads["moe_blocks"].sum()) == B * T * 2
        assert float(found.auxiliary["expert_balance"]) > 0.9


def test_every_weight_names_its_axes(model):
    definition, params, bias = model
    module = nnx.eval_shape(lambda: bind(definition, params, bias))
    ranks = [jax.tree.map(len, tree, is_leaf=is_axes) for tree in logical_axes(module)]
    assert ranks == [jax.tree.map(jnp.ndim, tree) for tree in (params, bias)]


@pytest.mark.parametrize("name", run_config.names())
def test_weight_decay_shrinks_what_is_published_as_a_matrix(name):
    """Gains and biases are published as vectors, whatever the number of their axes here; V4's `ape` as a matrix."""
    module = abstract_of(name)
    decays = paths(decayed(module), ("params",))
    _, params, _ = split(module)
    found = {
        path: len(t.shape) == 2 and not t.name.endswith(".ape")
        for t in names.tensors({"params": params})
        for path, _ in t.places
    }
    assert decays == found


def test_a_run_from_before_norms_of_queries_is_read_as_one_without():
    config = config_of("tiny_v1")
    now = family("v1").Config.from_config(config.model)
    saved = saved_config.to_json(config)
    del saved["format"], saved["model"]["qk_norm"], saved["model"]["yarn"]  # as the first runs kept it
    assert family("v1").Config.from_config(saved_config.from_json(saved).model) == now


# Layers as other releases have them: what changes in a tiny twin, and whose loads a step reports.
SHAPES = [
    ("tiny_v3", {"n_dense_layers": 0, "mtp_depth": 0, "q_rank": 0}, {"moe_blocks"}),
    ("tiny_v3", {"n_shared_experts": 0}, {"moe_blocks", "mtp"}),
    ("tiny_v3", {"n_dense_layers": 4}, {"mtp"}),
    ("tiny_v3", {"n_dense_layers": 9, "mtp_depth": 0}, set()),
    ("tiny_v2", {"n_dense_layers": 9}, set()),
    ("tiny_moe", {"n_dense_layers": 0, "n_shared_experts": 0}, {"moe_blocks"}),
]


@pytest.mark.parametrize(("twin", "changed", "routers"), SHAPES)
def test_a_step_of_other_layers_keeps_its_state_and_reports_its_routers(twin, changed, routers):
    config = smaller(config_of(twin))
    config.model.update(changed)
    if not routers:
        config.loss.balance_rate = 0.0
        config.loss.auxiliary.update(dict.fromkeys(config.loss.auxiliary, 0.0))
    trainer = run.trainer(config, make_mesh(1, 1, jax.devices()[:1]))
    ids_BT, weights_BT = (jax.ShapeDtypeStruct((B, T), dtype) for dtype in (jnp.int32, jnp.float32))
    batch = Batch(ids_BT, ids_BT, ids_BT, ids_BT, weights_BT)
    state, report = jax.eval_shape(trainer.step, trainer.abstract, batch)
    assert jax.tree.map(lambda x: x.shape, state) == jax.tree.map(lambda x: x.shape, trainer.abstract)
    assert set(report.loads) == routers


def test_biases_do_not_decay():
    decays = paths(decayed(abstract_module(qwen_coder())))
    assert {path[-1] for path, shrinks in decays.items() if not shrinks} == {
        *("gain", "q_bias_HQ", "k_bias_ZQ", "v_bias_ZU")
    }


# Published sizes; a last digit that the papers do not print comes from the formulas of section 2 of each report.
PUBLISHED = {
    "llm_7b": "6.910",
    "llm_67b": "67.425",
    "math_7b": "6.910",
    "coder_1b3": "1.346",
    "coder_6b7": "6.741",
    "coder_33b": "33.343",
    "moe_16b": "16.376",
    "v2_lite": "15.706",
    "v2_236b": "235.741",
    "v3_671b": "671.026",
    "v32_671b": "671.878",
    "v32_exp": "671.878",
    "v4_flash_284b": "284.332",
    "v4_pro_1t6": "1572.997",
    "r1_0528_qwen3_8b": "8.191",
    "r1_distill_qwen_1b5": "1.777",
    "r1_distill_qwen_7b": "7.616",
    "r1_distill_qwen_14b": "14.770",
    "r1_distill_qwen_32b": "32.764",
    "r1_distill_llama_8b": "8.030",
    "r1_distill_llama_70b": "70.554",
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_released_models_have_the_published_number_of_parameters(name):
    _, params, _ = split(abstract_of(name))
    assert f"{count_parameters(params)[0] / 1e9:.3f}" == PUBLISHED[name]


# Tokens of the published training runs, in 10^12, and after what share of them the learning rate changes.
RECIPES = {
    "llm_7b": (2.0, [0.8, 0.9]),
    "llm_67b": (2.0, [0.8, 0.9]),
    "math_7b": (0.5, [0.8, 0.9]),
    "coder_1b3": (2.0, [0.8, 0.9]),
    "coder_6b7": (2.0, [0.8, 0.9]),
    "coder_33b": (2.0, [0.8, 0.9]),
    "moe_16b": (2.009, [0.8, 0.9]),  # 106,449 steps
    "v2_lite": (5.7, [0.8, 0.9]),
    "v2_236b": (8.1, [0.6, 0.9]),
    "v3_671b": (14.8, [10 / 14.8, 14.3 / 14.8, 14.633 / 14.8]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_reads_the_published_tokens(name):
    config = config_of(name)
    tokens, shares = RECIPES[name]
    ramp, schedule = run.batch_ramp(config, n_replicas=1), config.schedule
    read = ramp.first(config.loop.steps) * config.data.seq_len
    assert read == pytest.approx(tokens * 1e12, rel=1e-4)
    parts = (schedule.warmup_steps + schedule.constant_steps, schedule.cosine_steps, schedule.tail_steps)
    changes = sorted({sum(parts[: n + 1]) for n in range(len(parts))})
    found = [ramp.first(step) * config.data.seq_len / read for step in changes]
    assert found == pytest.approx(shares, abs=1e-4)


@pytest.mark.parametrize(("name", "tokens"), [("v2_236b", 225e9), ("v3_671b", 469e9)])
def test_the_batch_grows_over_the_published_tokens(name, tokens):
    config = config_of(name)
    ramp = run.batch_ramp(config, n_replicas=1)
    assert ramp.first(ramp.ramp_steps) * config.data.seq_len == pytest.approx(tokens, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llm_7b", "llm_67b", "v2_236b"])
def test_the_plan_in_a_docstring_is_one_that_fits(name, capsys):
    said = importlib.import_module(f"deepseek_jax.configs.{name}").__doc__
    (command,) = re.findall("deepseek-jax plan (.*)", said)
    assert plan.main(command.split()) == 0
    assert re.search(r"^does it fit\? +yes", capsys.readouterr().out, re.MULTILINE)


def fields_of(cls) -> set[str]:
    """The fields of a family's `Config` and of its parts."""
    kinds = get_type_hints(cls)
    parts = [kind for kind in kinds.values() if dataclasses.is_dataclass(kind)]
    return set(kinds).union(*map(fields_of, parts))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_key_of_a_family_is_read(name):
    module = family(name)
    assert set(module.KEYS) <= fields_of(module.Config)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_says_what_is_missing(name):
    twin = "tiny_" + name
    config = config_of(twin)
    del config.model["vocab_size"]
    with pytest.raises(UserError, match="needs vocab_size"):
        family(name).Config.from_config(config.model)


@pytest.mark.parametrize(
    ("twin", "key", "value", "message"),
    [
        ("tiny_v1", "n_kv_heads", 3, "does not divide n_heads"),
        ("tiny_v1", "head_width", 31, "even width"),
        ("tiny_v1", "n_layers", 0, "expected a whole number from 1 to"),
        ("tiny_v1", "rope_llama3", {"factor": 8.0}, "rope_llama3"),
        ("r1_distill_llama_8b", "rope_factor", 4.0, "rope_factor=4.0 beside rope_llama3"),
        ("tiny_moe", "top_k", 17, "smaller top_k"),
        ("tiny_moe", "n_dense_layers", -1, "expected a whole number from 0 to"),
        ("tiny_v3", "n_shared_experts", -1, "expected a whole number from 0 to"),
        ("r1_0528_qwen3_8b", "rope_factor", 4.0, "rope_factor=4.0 beside yarn"),
        ("r1_0528_qwen3_8b", "yarn", {"factor": 4.0}, "yarn has the keys factor"),
        ("tiny_v2", "q_rank", -1, "expected a whole number from 0 to"),
        ("tiny_v2", "n_groups", 3, "divide the experts"),
    ],
)
def test_sizes_that_make_no_model_are_refused(twin, key, value, message):
    config = config_of(twin)
    config.model[key] = value
    with pytest.raises(UserError, match=message):
        family(config.family).Config.from_config(config.model)

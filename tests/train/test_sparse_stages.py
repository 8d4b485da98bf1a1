"""The two stages of sparse attention: V3's weights and a new indexer, which learns alone; then all learn."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax import run, run_config
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning, _headline
from deepseek_jax.parallel.mesh import global_batch, make_mesh
from deepseek_jax.tree import paths

B, T, STEPS = 2, 24, 3
SMALL = {"vocab_size": 64, "d_model": 16, "n_layers": 1, "n_dense_layers": 0, "n_heads": 2, "q_rank": 12, "kv_rank": 8}
SMALL |= {"nope_width": 8, "rope_width": 4, "value_width": 8, "n_experts": 4, "expert_width": 8, "top_k": 2}
SMALL |= {"n_groups": 1, "top_groups": 1, "mtp_depth": 0}
INDEXER = {"index_heads": 2, "index_width": 8, "index_top_k": 6}


def config_of(name):
    config = run_config.load(name)
    config.model.update(SMALL | (INDEXER if "v32" in name else {}))
    config.data.seq_len, config.batch.size = T, B
    config.loss.mtp_weight = config.loss.mtp_weight_final = 0.0
    return config


def batch():
    ids = np.random.default_rng(0).integers(0, 64, (B, T + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(T, dtype=np.int32), (B, T))
    ones = np.ones_like(positions)
    return Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))


class Made:
    """A stage: its first state from given weights, a few steps, and what they report."""

    def __init__(self, name, source, monkeypatch):
        config = config_of(name)
        config.run.init_from = "weights"
        monkeypatch.setattr(run, "open_weights", lambda _: source)
        monkeypatch.setattr(run, "copy_files", lambda *_: None)
        self.trainer = run.trainer(config, make_mesh(data=1, devices=jax.devices()[:1]))
        self.said = []
        state = run.first_state(config, self.trainer, None, self.said.append)
        self.before = jax.device_get(state["params"])
        self.moments = jax.eval_shape(lambda: state["optimizer"]["mu"])
        self.reports, self.config = [], config
        for _ in range(STEPS):
            state, report = self.trainer.step(state, global_batch(batch(), self.trainer.mesh))
            self.reports.append(jax.device_get(report))
        self.after = jax.device_get({"params": state["params"], "router_bias": state["router_bias"]})

    def moved(self):
        before, after = paths(self.before), paths(self.after["params"])
        return {path for path in before if np.any(before[path] != after[path])}


def source_of(config, weights):
    """Weights as `run.init_from` opens them: what is asked for, and no more, is given."""

    def read(target):
        asked = paths(target["params"])
        assert asked.keys() == paths(weights["params"]).keys()
        return {name: jax.tree.map(np.asarray, tree) for name, tree in weights.items()}

    return SimpleNamespace(config=config, read=read)


@pytest.fixture(scope="module")
def stages(filled):
    """(the first stage, the second): the first begins with a V3, the second with what the first has made."""
    from deepseek_jax.abstract_model import abstract_module

    with pytest.MonkeyPatch.context() as patch:
        v3 = config_of("tiny_v3")
        params, bias = filled(lambda: abstract_module(v3), std=0.2)[1:]
        first = Made("tiny_v32_warmup", source_of(v3, {"params": params, "router_bias": bias}), patch)
        second = Made("tiny_v32_sparse", source_of(first.config, first.after), patch)
    return first, second


@pytest.mark.slow
def test_in_the_first_stage_the_indexer_alone_is_new_and_moves(stages):
    first, _ = stages
    assert "initialised at random: indexer" in first.said
    indexers = {path for path in paths(first.before) if "indexer" in path}
    assert first.moved() == indexers and len(indexers) == 5
    assert paths(first.moments).keys() == indexers
    divergences = [float(report.auxiliary["index_kl"]) for report in first.reports]
    assert divergences[-1] < divergences[0]


@pytest.mark.slow
def test_in_the_second_stage_all_weights_move(stages):
    _, second = stages
    assert second.moved() == paths(second.before).keys()


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_the_language_models_loss_is_part_of_every_stages(stages, number):
    stage = stages[number]
    for report in stage.reports:
        auxiliary = stage.config.loss.auxiliary
        rest = sum(auxiliary[name] * value for name, value in report.auxiliary.items())
        assert float(report.main) > 2
        assert float(report.loss) == pytest.approx(report.main + rest, rel=1e-5)
        assert auxiliary.index_kl == 1.0 and auxiliary.index_recall == 0.0
        assert 0 < float(report.auxiliary["index_recall"]) < 1
    same = [float(report.main) for report in stage.reports]
    assert (same[0] == same[-1]) == (number == 0)  # frozen, a model says the same


@pytest.mark.parametrize("name", [name for name in run_config.names() if name.startswith(("v32_", "tiny_v32"))])
def test_every_config_with_an_indexer_weighs_its_losses(name):
    config = run_config.load(name)
    if config.family == "v32":
        assert (config.loss.auxiliary.index_kl, config.loss.auxiliary.index_recall) == (1.0, 0.0)
        assert config.model.index_dense == bool(config.loss.trained)  # dense attention is the warm-up's alone


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loss.trained": "indexers"}, "no weight of tiny_v32 has this in its path"),
        ({"loss.trained": "indexer"}, "balance_rate=0.01 moves router biases"),
        (
            {"loss.trained": "indexer", "loss.balance_rate": "0.0", "lora.rank": "2", "run.init_from": "weights"},
            "adapters alone are trained, and none has this in its path",
        ),
        ({"run.anew": "indexer"}, "none are named"),
        ({"kernels.attention": "chunked"}, r"no attention to all positions: .* Set it to 'xla'"),
    ],
)
def test_names_of_weights_and_keys_without_effect_are_checked(given, message):
    config = run_config.override(config_of("tiny_v32"), given)
    with pytest.raises(UserError, match=message):
        run.trainer(config, make_mesh(data=1, devices=jax.devices()[:1]))


def test_a_run_says_what_attends():
    config = config_of("tiny_v32")
    assert _headline.attention(config) == "xla, to 6 positions of an indexer's choice"
    config.kernels.attention, config.model.index_dense = "chunked", True
    assert _headline.attention(config) == "chunked"


def test_weights_that_are_there_do_not_begin_anew(monkeypatch):
    config = config_of("tiny_v32_warmup")
    config.run.init_from, source = "weights", SimpleNamespace(config=config_of("tiny_v32"))
    monkeypatch.setattr("deepseek_jax.weights.open_weights", lambda _: source)
    monkeypatch.setattr("deepseek_jax.weights.is_published", lambda _: False)
    with pytest.raises(UserError, match="config.run.anew='indexer': weights has such weights"):
        _beginning.check_sizes(config)


def test_tuning_a_model_with_an_indexer_weighs_its_losses(monkeypatch):
    source = SimpleNamespace(config=config_of("tiny_v32_warmup"))
    monkeypatch.setattr("deepseek_jax.weights.open_weights", lambda _: source)
    from deepseek_jax.configs import base

    config = _beginning.fine_tuning("weights", base.get_config())
    assert (config.loss.auxiliary.index_kl, config.family) == (1.0, "v32")
    assert (config.model.index_dense, source.config.model.index_dense) == (False, True)
    assert run.auxiliary(config)["index_kl"] == 1.0
    config.lora.rank = 2
    assert run.auxiliary(config)["index_kl"] == 0.0  # beside adapters its indexer is frozen

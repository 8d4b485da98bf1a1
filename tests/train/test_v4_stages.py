"""V4's stages: dense attention, an indexer that learns alone, sparse attention, longer texts."""

from types import SimpleNamespace

import jax
import numpy as np
import pytest

from deepseek_jax import run, run_config
from deepseek_jax.data.pipeline import Batch
from deepseek_jax.parallel.mesh import global_batch, make_mesh
from deepseek_jax.tree import paths

B, T, LONGER, STEPS = 2, 16, 24, 2
DENSE, WARMUP, SPARSE = CHAIN = ("tiny_v4_dense", "tiny_v4_warmup", "tiny_v4_sparse")
STAGES = ("v4_dense", "v4_16k", "v4_warmup", "v4_64k", "v4_1m")
SMALL = {"vocab_size": 64, "d_model": 16, "n_layers": 1, "compress_ratios": (4, 0), "n_hash_layers": 0, "n_heads": 2}
SMALL |= {"q_rank": 8, "head_width": 8, "rope_width": 4, "out_groups": 1, "out_rank": 8, "window": 4, "n_streams": 2}
SMALL |= {"index_heads": 2, "index_width": 8, "index_top_k": 2, "n_experts": 4, "expert_width": 8, "top_k": 2}
SMALL |= {"sinkhorn_steps": 2, "mtp_depth": 0, "init_std": 0.2}


def config_of(name):
    config = run_config.load(name)
    config.model.update(SMALL)
    config.data.seq_len, config.batch.size = T if name == DENSE else LONGER, B
    config.loss.balance_rate = 0.0
    config.schedule.warmup_steps = 0
    config.optimizer.method, config.optimizer.eps = "adamw", 1e-8
    config.loss.mtp_weight = config.loss.mtp_weight_final = 0.0
    return config


def batch(length):
    ids = np.random.default_rng(0).integers(0, 64, (B, length + 1)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), (B, length))
    ones = np.ones_like(positions)
    return Batch(ids[:, :-1], ids[:, 1:], ones, positions, ones.astype(np.float32))


class Made:
    """A stage: its first state, from the stage before if there is one, a few steps, and what they report."""

    def __init__(self, name, earlier, monkeypatch):
        config = self.config = config_of(name)
        if earlier:
            config.run.init_from = "weights"
            monkeypatch.setattr(run, "open_weights", lambda _: earlier.source())
            monkeypatch.setattr(run, "copy_files", lambda *_: None)
        self.trainer = run.trainer(config, make_mesh(data=1, devices=jax.devices()[:1]))
        state = run.first_state(config, self.trainer, None, lambda _: None)
        self.before = jax.device_get(state["params"])
        self.reports = []
        for _ in range(STEPS):
            state, report = self.trainer.step(state, global_batch(batch(config.data.seq_len), self.trainer.mesh))
            self.reports.append(jax.device_get(report))
        self.after = jax.device_get({"params": state["params"], "router_bias": state["router_bias"]})

    def source(self):
        """Its weights as `run.init_from` opens them: those that are asked for."""

        def read(target):
            asked, made = paths(target["params"]), paths(self.after["params"])
            assert asked.keys() <= made.keys()
            return self.after | {"params": jax.tree.map(lambda x, _: np.asarray(x), *_both(self.after, target))}

        return SimpleNamespace(config=self.config, read=read)

    def moved(self):
        before, after = paths(self.before), paths(self.after["params"])
        return {path for path in before if np.any(before[path] != after[path])}

    def losses(self):
        return [float(report.main) for report in self.reports]


def _both(state, target):
    """(the part of the weights that is asked for, what asks for it)."""

    def part(made, asked):
        return {key: part(made[key], sub) if isinstance(sub, dict) else made[key] for key, sub in asked.items()}

    return part(state["params"], target["params"]), target["params"]


@pytest.fixture(scope="module")
def chain():
    """The stages by name, each from the one before."""
    made, earlier = {}, None
    with pytest.MonkeyPatch.context() as patch:
        for name in CHAIN:
            earlier = made[name] = Made(name, earlier, patch)
    return made


def indexers(made):
    return {path for path in paths(made.before) if "indexer" in path}


@pytest.mark.slow
def test_each_stage_moves_what_it_is_to_move(chain):
    everything = paths(chain[DENSE].before).keys()
    assert len(indexers(chain[DENSE])) == 6
    assert chain[WARMUP].moved() == indexers(chain[WARMUP])
    assert chain[DENSE].moved() >= everything - indexers(chain[DENSE])
    assert chain[SPARSE].moved() == everything
    last, first = paths(chain[DENSE].after["params"]), paths(chain[WARMUP].before)
    new = {path for path in first if np.any(first[path] != last[path])}
    assert new <= indexers(chain[WARMUP]) and any(path[-1] == "q_up_RHQ" for path in new)  # made anew


@pytest.mark.slow
def test_no_switch_loses_the_loss_of_the_language_model(chain):
    """Frozen weights say the same with a new indexer, and sparse attention begins near where they are."""
    for made in chain.values():
        assert all(np.isfinite(report.loss) and report.finite for report in made.reports)
        auxiliary = made.config.loss.auxiliary
        for report in made.reports:
            rest = sum(auxiliary[name] * value for name, value in report.auxiliary.items())
            assert float(report.main) > 2 and float(report.loss) == pytest.approx(report.main + rest, rel=1e-5)
    dense, frozen, sparse = (chain[name].losses() for name in CHAIN)
    assert dense[1] < dense[0] and frozen[0] == frozen[1] and sparse[1] < sparse[0]
    assert sparse[0] == pytest.approx(frozen[0], abs=0.1) and sparse[0] != frozen[0]


@pytest.mark.slow
def test_the_indexer_learns_from_its_warm_up_on(chain):
    assert chain[DENSE].config.loss.auxiliary.index_kl == 0.0
    assert not any("index_kl" in report.auxiliary for report in chain[DENSE].reports)  # nothing computes it there
    first, second = (float(report.auxiliary["index_kl"]) for report in chain[WARMUP].reports)
    assert second < first
    assert chain[SPARSE].config.loss.auxiliary.index_kl == 1.0 and not chain[SPARSE].config.model.index_dense


def test_the_published_stages_have_the_published_numbers():
    configs = {name: run_config.load(name) for name in STAGES}
    assert [config.data.seq_len for config in configs.values()] == [4096, 16_384, 65_536, 65_536, 1_048_576]
    assert [config.model.index_dense for config in configs.values()] == [True, True, True, False, False]
    assert [bool(config.model.yarn) for config in configs.values()] == [False] * 4 + [True]
    tokens = {name: config.batch.size * config.data.seq_len for name, config in configs.items()}
    assert {tokens[name] for name in STAGES if name != "v4_warmup"} == {72 * 2**20}  # 75.5M
    trillions = {name: config.loop.steps * tokens[name] / 1e12 for name, config in configs.items()}
    assert trillions["v4_dense"] + trillions["v4_16k"] == pytest.approx(1, rel=2e-3)
    assert sum(trillions.values()) == pytest.approx(32, rel=2e-3)
    for name, config in configs.items():
        schedule, last = config.schedule, config.loop.steps
        assert schedule.warmup_steps + schedule.constant_steps + schedule.cosine_steps == last
        weights = config.loss.mtp_weight, config.loss.mtp_weight_final
        assert weights == ((0.3, 0.1) if name in ("v4_dense", "v4_16k", "v4_64k") else (0.1, 0.1))


def test_texts_of_a_stage_are_longer_by_as_many_as_they_are_fewer():
    for earlier, later in ((DENSE, WARMUP), (SPARSE, "tiny_v4_long")):
        one, other = run_config.load(earlier), run_config.load(later)
        assert one.batch.size * one.data.seq_len == other.batch.size * other.data.seq_len
        assert one.data.seq_len < other.data.seq_len

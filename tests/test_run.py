"""A run assembled from its config: keys without effect are errors, and the first batch has a default."""

import jax
import pytest

from deepseek_jax import run, run_config
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.saved_config import to_json


@pytest.mark.parametrize(
    ("name", "key", "value", "what"),
    [
        ("tiny_v1", "loss.mtp_weight", 0.5, "multi-token prediction"),
        ("tiny_v1", "loss.balance_rate", 0.01, "router biases"),
        ("tiny_v1", "sharding.q_latent", "data", "weight with the axis q_latent"),
        ("tiny_v1", "fp8.scale", "ue8m0", r"products in FP8 \(config\.precision=fp8\)"),
        ("tiny_v1", "optimizer.rms", 0.5, r"matrices that Muon updates \(config\.optimizer\.method=muon\)"),
        ("tiny_v2", "loss.balance_rate", 0.5, "router biases"),
    ],
)
def test_a_key_that_was_set_and_has_no_effect_on_the_model_is_an_error(name, key, value, what):
    config, mesh = run_config.load(name), make_mesh(1, 1, jax.devices()[:1])
    run.trainer(config, mesh)
    run_config.override(config, {key: str(value)})
    with pytest.raises(UserError, match=rf"config\.{key}={value!r} has no effect: .* no {what}\. Set it to "):
        run.trainer(config, mesh)


def test_multi_token_prediction_is_left_out_by_its_depth_alone():
    config = run_config.override(run_config.load("tiny_v3"), {"model.mtp_depth": "0"})
    assert "mtp" not in run.trainer(config, make_mesh(1, 1, jax.devices()[:1])).abstract["params"]


def test_a_batch_is_constant_unless_it_has_a_first_size():
    config = run_config.load("tiny_v3")
    for size, first, starts in ((32, 0, 32), (32, 8, 8), (16, 64, 16)):
        config.batch.update({"size": size, "size_start": first, "ramp_steps": 100})
        ramp = run.batch_ramp(config, 8)
        assert (ramp.size_at(0), ramp.size_at(100)) == (starts, size)
    with pytest.raises(UserError, match=r"config\.batch\.size_start=16 does not divide over 32 devices"):
        config.batch.update({"size": 32, "size_start": 16})
        run.batch_ramp(config, 32)


def test_a_run_with_an_earlier_way_to_state_its_first_batch_is_the_same_run(tmp_path):
    config = run_config.load("tiny_v3")
    old = config.copy_and_resolve_references()
    old.batch.size_start = old.batch.size
    run.check_same_run(config, "text", {"config": to_json(old), "text": "text"}, tmp_path)
    old.batch.update({"size_start": 4, "ramp_steps": 10})
    with pytest.raises(UserError, match=r"config\.batch\."):
        run.check_same_run(config, "text", {"config": to_json(old), "text": "text"}, tmp_path)

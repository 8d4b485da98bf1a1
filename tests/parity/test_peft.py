"""Adapters against PEFT's, both ways: what we write it opens, what it writes we open, and the logits agree."""

import numpy as np
import pytest

import deepseek_jax as dsj
from deepseek_jax import run_config
from deepseek_jax.abstract_model import abstract_weights
from deepseek_jax.convert import peft as ours
from deepseek_jax.layers import lora

# PEFT asks transformers for what this version has renamed
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")
IDS = np.arange(24).reshape(2, 12) * 5 % 61


@pytest.fixture(scope="module", autouse=True)
def theirs():
    """Imports them, which takes seconds, when the first test begins and not wherever tests are collected."""
    global torch, transformers, peft
    torch, transformers, peft = (pytest.importorskip(name) for name in ("torch", "transformers", "peft"))


def published(name, folder):
    """A tiny model as published in `folder`: (ours, theirs)."""
    config = run_config.load(name)
    model = config.model
    model.update(d_model=32, n_layers=2, vocab_size=320)
    if "mtp_depth" in model:
        model.mtp_depth = 0
    if model.get("expert_width", 0) % 4:
        model.expert_width = 40  # torch takes rows of whole 16 bytes
    dsj.save_pretrained(dsj.build(config, seed=0), folder, dtype="fp32")
    return dsj.load(folder), transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def theirs_say(model):
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def ours_say(folder, adapters):
    return np.asarray(dsj.load(folder, adapters=adapters)(IDS))


def assert_close(a, b):
    np.testing.assert_allclose(a, b, atol=2e-5 * np.abs(b).max())


@pytest.mark.parametrize("name", ["tiny_v1", "tiny_v2", "tiny_v3", "tiny_v4"])
def test_both_open_what_the_other_wrote(name, tmp_path):
    mine, base = published(name, tmp_path / "base")
    shapes = abstract_weights(mine.config)
    found = ours.lora(shapes, 3, 6.0, "all-linear")
    rng = np.random.default_rng(0)
    adapters = {
        path: rng.normal(0, 0.3, x.shape).astype(np.float32)
        for path, x in lora.abstract_adapters(shapes["params"], found).items()
    }
    ours.write(tmp_path / "mine", str(tmp_path / "base"), shapes, found, lambda path, layer: adapters[path][layer])
    before = theirs_say(base)
    opened = peft.PeftModel.from_pretrained(base, tmp_path / "mine")
    expected = ours_say(tmp_path / "base", tmp_path / "mine")
    assert np.abs(expected - before).max() > 0.1 * np.abs(before).max()
    assert_close(theirs_say(opened), expected)

    opened.save_pretrained(tmp_path / "theirs")
    said = ours.settings(tmp_path / "theirs")
    assert (said["rank"], said["alpha"]) == (3, 6.0)
    again = ours.lora(shapes, said["rank"], said["alpha"], said["targets"])
    back = ours.read(tmp_path / "theirs", shapes, again)
    assert again == found and back.keys() == adapters.keys()
    for path, array in back.items():
        np.testing.assert_array_equal(array, adapters[path])


def test_some_matrices_as_they_name_them(tmp_path):
    _, base = published("tiny_v1", tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=5, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    opened = peft.get_peft_model(base, config)
    opened.save_pretrained(tmp_path / "theirs")
    said = ours.settings(tmp_path / "theirs")
    assert said == {"rank": 2, "alpha": 5.0, "targets": "down_proj,q_proj"}
    assert_close(theirs_say(opened), ours_say(tmp_path / "base", tmp_path / "theirs"))

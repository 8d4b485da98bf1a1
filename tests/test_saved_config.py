"""The config kept beside a checkpoint: exact, and that of an earlier format read as what it is now.

tests/train/saved_config_format_1.json is the config.json that the version before format 2 wrote for nano_v3.
"""

import json
from pathlib import Path

import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.run_bounds import BOUNDS
from deepseek_jax.saved_config import FORMAT, RENAMED, completed, from_json, leaves, to_json
from deepseek_jax.train.checkpoint.checkpointer import Checkpointer
from deepseek_jax.weights import open_weights

TRAIN = Path(__file__).parent / "train"
FORMAT_1 = json.loads((TRAIN / "saved_config_format_1.json").read_text())


def test_json_gives_back_the_same_config():
    tree = {"i": 1, "f": 1.0, "third": 1 / 3, "huge": 1e300, "t": (1, (2.0, None)), "l": [1, (2,)], "s": "é", "b": True,
            "n": None, "empty": {}, "sub": {"x": (), "y": -0.0}}  # fmt: skip
    config = ConfigDict(tree).lock()
    back = from_json(json.loads(json.dumps(to_json(config))))
    assert back == config
    assert repr(back.to_dict()) == repr(config.to_dict())


def test_a_config_of_format_1_is_the_same_run():
    config = run_config.validate(from_json(FORMAT_1))
    assert config == run_config.load(str(TRAIN / "nano_v3.py"))
    assert to_json(config)["format"] == FORMAT


def test_a_config_of_format_2_is_the_same_run():
    """It differs in the place of one key."""
    config = run_config.override(run_config.load("tiny_v3"), {"pipeline.micro_batches": "4"})
    older = to_json(config) | {"format": 2}
    older["run"]["micro_batches"] = older["pipeline"].pop("micro_batches")
    assert from_json(older) == config


def test_every_key_of_format_1_has_its_place():
    old, new = leaves(ConfigDict(FORMAT_1)), leaves(from_json(FORMAT_1))
    assert {key for key in RENAMED if key != "run.micro_batches"} <= old.keys()
    assert set(RENAMED.values()) <= BOUNDS.keys()
    assert not [key for key in old if key not in new and key not in RENAMED and "__tuple__" not in key]
    for key, value in RENAMED.items():
        assert key not in old or new[value] == old[key], key


def test_what_a_run_of_format_1_did_not_have_gets_its_default():
    older = {key: value for key, value in FORMAT_1.items() if key != "release"}
    assert from_json(older).release == run_config.load("base").release


def test_a_run_of_today_without_a_key_of_tomorrow_gets_its_default():
    config = run_config.load("tiny_v3")
    older = {key: value for key, value in to_json(config).items() if key != "sharding"}
    assert completed(from_json(older)) == config


def test_a_checkpoint_with_a_config_of_format_1_is_opened(tmp_path):
    with Checkpointer(tmp_path / "checkpoints") as checkpoints:
        checkpoints.save(7, {"params": {"weight": jnp.arange(8.0)}}, {"config": FORMAT_1})
    assert open_weights(tmp_path).config.loop.steps == FORMAT_1["train"]["steps"]


def test_a_format_to_come_is_refused():
    with pytest.raises(UserError, match=f"format {FORMAT + 1}, this version of deepseek_jax reads 1 to {FORMAT}"):
        from_json({"format": FORMAT + 1})

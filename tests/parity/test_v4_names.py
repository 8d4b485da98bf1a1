"""transformers opens what we write of V4: every tensor is one of its own, and what it saves again is read here."""

import jax
import numpy as np
import pytest

from deepseek_jax.convert import hf
from deepseek_jax.tree import paths
from tests.convert.test_v4 import NUMBERS, entries, host_tree, publish, shapes


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of random numbers, exported in float32; (its directory, its weights)."""
    folder = tmp_path_factory.mktemp("v4")
    publish(folder / "hub", entries())
    weights = host_tree(hf.Source(hf.open_published(folder / "hub"), shapes()))
    weights = jax.tree.map(lambda a: a if a.dtype == np.int32 else a.astype(np.float32), weights)
    hf.write(folder / "fp32", "v4", NUMBERS, weights, hf.from_tree(weights), "fp32")
    return folder / "fp32", weights


def test_it_opens_with_every_tensor_and_saves_what_we_read(exported, tmp_path):
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    directory, weights = exported
    model, found = v4.DeepseekV4ForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), found
    assert model.config.layer_types[1:3] == ["compressed_sparse_attention", "heavily_compressed_attention"]
    model.save_pretrained(tmp_path / "theirs")
    published = hf.open_published(tmp_path / "theirs", lambda message: None)
    assert published.numbers == NUMBERS | {"mtp_depth": 0, "init_std": published.numbers["init_std"]}
    own = {root: {name: sub for name, sub in tree.items() if name != "mtp"} for root, tree in shapes().items()}
    mine, known = paths(host_tree(hf.Source(published, own))), paths(weights)
    for path, leaf in mine.items():
        np.testing.assert_array_equal(leaf, known[path], err_msg=str(path))

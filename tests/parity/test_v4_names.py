"""transformers opens what we write of V4: every tensor is one of its own, it says the same, and we read what it saves.

The config is read by both as well: schedules, rotary bases and YaRN, the routes' scale, the bounds of SwiGLU.
"""

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.convert import hf
from deepseek_jax.layers.base import bind, split
from deepseek_jax.models import v4 as family
from deepseek_jax.tree import paths
from tests.convert.test_v4 import NUMBERS, V, host_tree

# a layer, and a group that repeats; heads of indexers enough that no scores are equal
SIZES = NUMBERS | {"n_layers": 5, "compress_ratios": (0, 4, 8, 4, 8, 0), "index_heads": 16}
B, T = 2, 47  # longer than the window, than blocks of both compressors, and with more entries than an indexer chooses


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A model of random numbers, exported in float32: (its directory, its definition, its weights)."""
    c = family.Config.from_config(ConfigDict(SIZES))
    definition, params, biases = split(nnx.eval_shape(lambda: family.Model(c, rngs=nnx.Rngs(0))))
    draw, directory = np.random.default_rng(0), tmp_path_factory.mktemp("v4") / "fp32"

    def drawn(path, leaf):
        if path[-1] == "experts_VK":
            return np.int32(draw.random((*leaf.shape[:-1], SIZES["n_experts"])).argsort(-1)[..., : leaf.shape[-1]])
        numbers = np.float32(draw.normal(size=leaf.shape))
        return 1 + 0.2 * numbers if path[-1] == "gain" else 0.3 * numbers

    tree = {"params": params, "router_bias": biases}
    weights = jax.tree_util.tree_map_with_path(lambda path, leaf: drawn([key.key for key in path], leaf), tree)
    hf.write(directory, "v4", SIZES, weights, hf.from_tree(weights), "fp32")
    return directory, definition, weights


def test_it_opens_with_every_tensor_says_the_same_and_saves_what_we_read(exported, tmp_path):
    torch = pytest.importorskip("torch")
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    directory, definition, weights = exported
    model, found = v4.DeepseekV4ForCausalLM.from_pretrained(
        directory, output_loading_info=True, attn_implementation="eager", experts_implementation="eager"
    )
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), found
    assert model.config.layer_types[1:3] == ["compressed_sparse_attention", "heavily_compressed_attention"]

    ids_BT = np.random.default_rng(1).integers(0, V, (B, T)).astype(np.int32)
    with torch.no_grad():
        theirs = model.eval()(input_ids=torch.tensor(ids_BT, dtype=torch.long), use_cache=False).logits.numpy()
    ours = jax.jit(lambda params, biases: bind(definition, params, biases)(ids_BT))(*weights.values())
    print(f"logits {np.abs(ours - theirs).max():.1e} of {np.abs(theirs).max():.1f}")
    assert np.abs(ours - theirs).max() <= 5e-5 and theirs.std() > 0.3

    model.save_pretrained(tmp_path / "theirs")
    published = hf.open_published(tmp_path / "theirs", lambda message: None)
    assert published.numbers == SIZES | {"mtp_depth": 0, "init_std": published.numbers["init_std"]}
    own = {root: {name: sub for name, sub in tree.items() if name != "mtp"} for root, tree in weights.items()}
    mine, known = paths(host_tree(hf.Source(published, own))), paths(weights)
    for path, leaf in mine.items():
        np.testing.assert_array_equal(leaf, known[path], err_msg=str(path))

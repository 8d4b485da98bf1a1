"""transformers opens what we write of V4: every tensor is one of its own, it says the same, and we read what it saves.

It has no multi-token prediction, but all parts of which that consists. The config is read by both as well: schedules,
rotary bases and YaRN, the routes' scale, the bounds of SwiGLU.
"""

import functools

import jax
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.convert import hf
from deepseek_jax.layers.base import bind, split
from deepseek_jax.layers.tokens import Tokens
from deepseek_jax.models import v4 as family
from deepseek_jax.tree import paths
from tests.convert.test_v4 import NUMBERS, V, host_tree

# a layer, and a group that repeats; heads of indexers enough that no scores are equal
SIZES = NUMBERS | {"n_layers": 5, "compress_ratios": (0, 4, 8, 4, 8, 0), "index_heads": 16}
# longer than the window, than blocks of both compressors, and with more entries than an indexer chooses
IDS_BT = np.random.default_rng(1).integers(0, V, (2, 47)).astype(np.int32)


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


@pytest.fixture(scope="module")
def opened(exported):
    """(transformers' model, what it said of the tensors, its streams after the last layer, its logits)."""
    model, found = load(exported[0])
    streams = []
    hook = model.model.layers[-1].register_forward_hook(lambda _, given, made: streams.append(made))
    logits = logits_of(model)
    hook.remove()
    return model, found, streams[0] if torch.is_tensor(streams[0]) else streams[0][0], logits


@pytest.fixture(scope="module")
def ours(exported):
    """(logits, those of multi-token prediction) of our model."""
    _, definition, weights = exported

    @jax.jit
    def run(params, biases):
        model, tokens = bind(definition, params, biases), Tokens.of(IDS_BT[:, :-1])
        x_BTOD, _ = model.run_blocks(model.begin(model.embed(tokens)), tokens)
        (depth,) = model.mtp_depths(x_BTOD, IDS_BT[:, 1:], tokens)
        return model.head(model.finish(x_BTOD)), model.head(depth.h_BTD)

    return jax.device_get(run(*weights.values()))


def load(directory):
    global torch
    torch = pytest.importorskip("torch")
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    eager = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return v4.DeepseekV4ForCausalLM.from_pretrained(directory, output_loading_info=True, **eager)


def logits_of(model, ids_BT=IDS_BT):
    with torch.no_grad():
        return model.eval()(input_ids=torch.tensor(ids_BT, dtype=torch.long), use_cache=False).logits.numpy()


def check(ours, theirs):
    print(f"logits {np.abs(ours - theirs).max():.1e} of {np.abs(theirs).max():.1f}")
    assert np.abs(ours - theirs).max() <= 5e-5 and theirs.std() > 0.3


def test_it_opens_with_every_tensor_and_says_the_same(opened, ours):
    model, found, _, logits = opened
    assert not any(found[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")), found
    assert model.config.layer_types[1:3] == ["compressed_sparse_attention", "heavily_compressed_attention"]
    check(ours[0], logits[:, :-1])


def test_multi_token_prediction_is_that_layer_over_what_is_joined(exported, opened, ours, tmp_path):
    """The released code's MTPBlock in transformers' parts: a model of this one layer, given W_e norm e + W_h norm X."""
    params, biases = (exported[2][root] for root in ("params", "router_bias"))
    depth, stacked = params["mtp"]["0"], functools.partial(jax.tree.map, lambda a: a[None])
    tree = {"params": {name: params[name] for name in ("embedding", "head")}}
    tree["params"] |= {name: depth[name] for name in ("streams_head", "final_norm")}
    tree["params"]["blocks_0"] = stacked(depth["block"])
    tree["router_bias"] = {"blocks_0": stacked(biases["mtp"]["0"]["block"])}
    sizes = SIZES | {"n_layers": 1, "compress_ratios": (0,), "n_hash_layers": 0, "mtp_depth": 0}
    hf.write(tmp_path / "one", "v4", sizes, tree, hf.from_tree(tree), "fp32")
    model, _ = load(tmp_path / "one")

    def joined(_, given, named):
        embedded_BTD, x_BTOD = params["embedding"]["table_VD"][IDS_BT[:, 1:]], opened[2].numpy()[:, :-1]
        x_BTOD = normed(x_BTOD, depth["hidden_norm"]) @ depth["hidden_YD"]
        x_BTOD += (normed(embedded_BTD, depth["embedding_norm"]) @ depth["embedding_YD"])[:, :, None]
        return (torch.tensor(x_BTOD), *given[1:]), named

    model.model.layers[0].register_forward_pre_hook(joined, with_kwargs=True)
    check(ours[1], logits_of(model, IDS_BT[:, 1:]))


def normed(x, norm):
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + 1e-6) * norm["gain"]


def test_what_it_saves_is_what_we_read(exported, opened, tmp_path):
    weights = exported[2]
    opened[0].save_pretrained(tmp_path / "theirs")
    published = hf.open_published(tmp_path / "theirs", lambda message: None)
    assert published.numbers == SIZES | {"mtp_depth": 0, "init_std": published.numbers["init_std"]}
    own = {root: {name: sub for name, sub in tree.items() if name != "mtp"} for root, tree in weights.items()}
    mine, known = paths(host_tree(hf.Source(published, own))), paths(weights)
    for path, leaf in mine.items():
        np.testing.assert_array_equal(leaf, known[path], err_msg=str(path))

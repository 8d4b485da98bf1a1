"""V4's attention live against transformers: outputs and gradients of each kind of layer, with the same weights.

Texts are compared unpadded: transformers compresses from the first column of a batch, padding included. Its texts of
all lengths are prefixes of one, whose outputs are ours.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.layers.base import bind, split
from deepseek_jax.layers.compressed import CompressedAttention, CompressedConfig
from deepseek_jax.layers.indexer import IndexerConfig
from deepseek_jax.layers.rope import Yarn

D, T = 24, 57
SIZES = CompressedConfig(4, 16, 8, 12, 2, 6, window=8, yarn=Yarn(16.0, 64), init_std=0.3)
INDEX = IndexerConfig(16, 12, 5, SIZES.q_rank, init_std=0.3)  # heads enough that no scores are equal
KINDS = {"sliding": (0, None), "compressed_sparse": (4, INDEX), "heavily_compressed": (16, None)}
LENGTHS = (1, 3, 4, 7, 8, 9, 15, 16, 20, 23, 24, 33, 48, T)  # about the window, blocks, and top_k of them


@pytest.fixture(scope="module", autouse=True)
def libraries():
    global torch, v4
    torch = pytest.importorskip("torch")
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def config(kind):
    return v4.DeepseekV4Config(
        hidden_size=D,
        num_hidden_layers=1,
        num_attention_heads=SIZES.n_heads,
        head_dim=SIZES.head_width,
        qk_rope_head_dim=SIZES.rope_width,
        q_lora_rank=SIZES.q_rank,
        o_groups=SIZES.out_groups,
        o_lora_rank=SIZES.out_rank,
        sliding_window=SIZES.window,
        index_n_heads=INDEX.index_heads,
        index_head_dim=INDEX.index_width,
        index_topk=INDEX.index_top_k,
        layer_types=[f"{kind}_attention"],
        max_position_embeddings=1024,
        compress_rates={"compressed_sparse_attention": 4, "heavily_compressed_attention": 16},
        rope_parameters={"rope_type": "yarn", "factor": 16.0, "original_max_position_embeddings": 64},
        attn_implementation="eager",
    )


class Theirs:
    """An attention of transformers with random weights."""

    def __init__(self, kind):
        c, generator = config(kind), torch.Generator().manual_seed(3)
        self.attention, self.rotary = v4.DeepseekV4Attention(c, 0).eval(), v4.DeepseekV4RotaryEmbedding(c)
        for name, weight in self.attention.named_parameters():
            drawn = torch.randn(weight.shape, generator=generator)
            weight.data = 1 + 0.3 * drawn if "norm" in name else drawn * (1.0 if "sinks" in name else 0.3)
        self.weights = {name: weight.detach().numpy() for name, weight in self.attention.named_parameters()}

    def __call__(self, x_BTD):
        positions = torch.arange(x_BTD.shape[1])[None]
        tables = {name: self.rotary(x_BTD, positions, layer_type=name) for name in ("main", "compress")}
        apart = positions[0][:, None] - positions[0]
        mask = torch.where((apart >= 0) & (apart < SIZES.window), 0.0, -torch.inf)[None, None]
        return self.attention(x_BTD, tables, positions.expand(len(x_BTD), -1), mask.expand(len(x_BTD), -1, -1, -1))[0]


def tree_of(weights):
    """Their weights, or gradients of them, in our tree."""
    h, q, g = SIZES.n_heads, SIZES.head_width, SIZES.out_groups

    def compressor(prefix):
        names = {"kv_DQ": "kv_proj.weight", "gate_DQ": "gate_proj.weight", "bias_JQ": "position_bias"}
        found = {ours: weights[prefix + theirs] for ours, theirs in names.items()}
        found |= {name: found[name].T for name in ("kv_DQ", "gate_DQ")}
        return found | {"norm": {"gain": weights[prefix + "kv_norm.weight"]}}

    tree = {
        "q_down_DR": weights["q_a_proj.weight"].T,
        "q_norm": {"gain": weights["q_a_norm.weight"]},
        "q_up_RHQ": weights["q_b_proj.weight"].T.reshape(-1, h, q),
        "kv_DQ": weights["kv_proj.weight"].T,
        "kv_norm": {"gain": weights["kv_norm.weight"]},
        "sink_H": weights["sinks"],
        "out_down_YGR": weights["o_a_proj.weight"].T.reshape(h // g * q, g, -1),
        "out_up_GRD": weights["o_b_proj.weight"].T.reshape(g, -1, D),
    }
    if "compressor.position_bias" in weights:
        tree["compressor"] = compressor("compressor.")
    if "compressor.indexer.q_b_proj.weight" in weights:
        up = weights["compressor.indexer.q_b_proj.weight"].T
        weigh = weights["compressor.indexer.scorer.weights_proj.weight"].T
        tree["indexer"] = {"q_up_RHQ": up.reshape(-1, INDEX.index_heads, INDEX.index_width), "weight_DH": weigh}
        tree["indexer"]["key"] = compressor("compressor.indexer.")
    return tree


@functools.cache
def ours(kind):
    """Shapes of the weights, and a function of weights, x and a direction: ((_, output), gradients)."""
    ratio, index = KINDS[kind]
    module = nnx.eval_shape(lambda: CompressedAttention(SIZES, D, ratio=ratio, index=index, rngs=nnx.Rngs(0)))
    definition, params, none = split(module)

    def value(weights, x_BTD, along_BTD):
        u_BTD = bind(definition, weights, none)(x_BTD)
        return jnp.sum(u_BTD * along_BTD), u_BTD

    return params, jax.jit(jax.value_and_grad(value, argnums=(0, 1), has_aux=True))


@pytest.mark.parametrize("kind", KINDS)
def test_outputs_of_all_lengths_and_gradients(kind):
    theirs, generator = Theirs(kind), np.random.default_rng(1)
    x_BTD, along_BTD = generator.normal(size=(2, 2, T, D)).astype(np.float32)
    params, run = ours(kind)
    weights = tree_of(theirs.weights)
    assert jax.tree.map(lambda a: a.shape, params) == jax.tree.map(lambda a: a.shape, weights)
    (_, u_BTD), (gradient, x_gradient) = run(weights, x_BTD, along_BTD)
    with torch.no_grad():
        worst = max(
            np.abs(theirs(torch.tensor(x_BTD[:, :n])).numpy() - np.asarray(u_BTD[:, :n])).max() for n in LENGTHS
        )
    x = torch.tensor(x_BTD, requires_grad=True)
    (theirs(x) * torch.tensor(along_BTD)).sum().backward()
    found = {
        name: np.zeros(weight.shape, np.float32) if weight.grad is None else weight.grad.numpy()
        for name, weight in theirs.attention.named_parameters()
    }
    expected = jax.tree_util.tree_leaves_with_path(tree_of(found) | {"x": x.grad.numpy()})
    compared = dict(jax.tree_util.tree_leaves_with_path(jax.device_get(gradient) | {"x": np.asarray(x_gradient)}))
    apart = {
        jax.tree_util.keystr(path): np.abs(compared[path] - wanted).max() / max(np.abs(wanted).max(), 1e-30)
        for path, wanted in expected
    }
    print(f"{kind}: outputs {worst:.1e}, gradients {max(apart.values()):.1e}")
    assert worst <= 2e-5
    assert max(apart.values()) <= 1e-4, apart

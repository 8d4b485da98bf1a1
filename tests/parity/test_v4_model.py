"""Whole V4 models live against transformers: logits of whole texts and of decoding, gradients of every weight.

The layers' kinds, in the orders of Flash (which repeat as a group) and of Pro; texts longer than the window, than
several blocks of each compressor, and with more entries than an indexer chooses. transformers has no multi-token
prediction.
"""

import functools
from dataclasses import asdict

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from ml_collections import ConfigDict

from deepseek_jax.layers.base import bind, split
from deepseek_jax.models import v4 as family
from tests.parity import test_v4_attention as attention

B, T, PROMPT, V, E, F, K = 2, 57, 17, 64, 6, 10, 2
D = attention.D
SCHEDULES = {"flash": ((0, 4, 16, 4, 16), 1), "pro": ((16, 16, 4), 2)}
NAMES = {0: "sliding", 4: "compressed_sparse", 16: "heavily_compressed"}


@pytest.fixture(scope="module", autouse=True)
def libraries():
    global torch, v4
    torch = pytest.importorskip("torch")
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    attention.torch, attention.v4 = torch, v4
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def numbers(ratios, n_hashed) -> ConfigDict:
    """`config.model` of these layers."""
    sizes, index = asdict(attention.SIZES), asdict(attention.INDEX)
    sizes["yarn"] = {"factor": 16.0, "original_length": 64}
    sizes |= {key: index[key] for key in ("index_heads", "index_width", "index_top_k")}
    sizes |= {"vocab_size": V, "d_model": D, "n_layers": len(ratios), "compress_ratios": ratios, "index_ratio": 4}
    sizes |= {"n_hash_layers": n_hashed, "n_streams": 4, "sinkhorn_steps": 20, "hyper_eps": 1e-6, "n_experts": E}
    sizes |= {"n_shared_experts": 1, "expert_width": F, "top_k": K, "route_scale": 1.5, "swiglu_limit": 0.5}
    return ConfigDict(sizes | {"mtp_depth": 0, "index_dense": False})


class Theirs:
    """A model of transformers with random weights, its logits of a text, and the gradients of their cross-entropy."""

    def __init__(self, ratios, n_hashed):
        layers = [f"{NAMES[ratio]}_attention" for ratio in ratios]
        c = attention.config("sliding").to_dict() | {"vocab_size": V, "num_hidden_layers": len(ratios)}
        for key in ("layer_types", "mlp_layer_types", "transformers_version", "architectures"):
            c.pop(key, None)
        c |= {"layer_types": layers, "mlp_layer_types": ["hash_moe"] * n_hashed + ["moe"] * (len(ratios) - n_hashed)}
        c |= {"moe_intermediate_size": F, "n_routed_experts": E, "num_experts_per_tok": K, "swiglu_limit": 0.5}
        c = v4.DeepseekV4Config(**c)
        c._attn_implementation = c._experts_implementation = "eager"
        model, generator = v4.DeepseekV4ForCausalLM(c).eval(), torch.Generator().manual_seed(7)
        for name, tensor in (*model.named_parameters(), *model.named_buffers()):
            if "tid2eid" in name:
                tensor.copy_(torch.stack([torch.randperm(E, generator=generator)[:K] for _ in range(V)]))
            elif "inv_freq" not in name:
                drawn = torch.randn(tensor.shape, generator=generator)
                tensor.data = 1 + 0.2 * drawn if "norm" in name else 0.3 * drawn
        self.ids = torch.randint(0, V, (B, T), generator=generator)
        logits = model(input_ids=self.ids, use_cache=False).logits
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()).backward()
        self.logits = logits.detach().numpy()
        every = {**dict(model.named_parameters()), **dict(model.named_buffers())}
        self.weights = {name: tensor.detach().numpy() for name, tensor in every.items()}
        self.gradients = {
            name: np.zeros(w.shape, np.float32) if w.grad is None else w.grad.numpy()
            for name, w in model.named_parameters()
        }


def layer_of(weights, prefix):
    """(weights, router biases) of one of their layers, in our tree."""
    own = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
    of_attention = {name.removeprefix("self_attn."): w for name, w in own.items() if name.startswith("self_attn.")}

    def streams(name):
        mix = own[f"{name}.fn"].T.reshape(4, D, -1)
        return {"mix_ODY": mix, "bias_Y": own[f"{name}.base"], "scale": own[f"{name}.scale"]}

    both, down = own["mlp.experts.gate_up_proj"], own["mlp.experts.down_proj"]
    routed = {"gate_XDF": both[:, :F], "up_XDF": both[:, F:], "down_XFD": down}
    shared = {"gate_DF": "gate_proj", "up_DF": "up_proj", "down_FD": "down_proj"}
    experts = {name: np.swapaxes(w, 1, 2) for name, w in routed.items()}
    experts["shared"] = {ours: own[f"mlp.shared_experts.{theirs}.weight"].T for ours, theirs in shared.items()}
    experts["router"] = {"centroids_DE": own["mlp.gate.weight"].T}
    tree = {"attention": attention.tree_of(of_attention), "experts": experts}
    tree |= {"attention_norm": {"gain": own["input_layernorm.weight"]}}
    tree |= {"experts_norm": {"gain": own["post_attention_layernorm.weight"]}}
    tree |= {"attention_residual": streams("attn_hc"), "experts_residual": streams("ffn_hc")}
    bias = {"bias_E": own.get("mlp.gate.e_score_correction_bias"), "experts_VK": own.get("mlp.gate.tid2eid")}
    return tree, {"experts": {"router": {name: w for name, w in bias.items() if w is not None}}}


def tree_of(weights, shapes):
    """Their weights, or gradients of them, as (weights, router biases) of our model with these shapes."""
    params, biases, first = {}, {}, 0
    for name in sorted((key for key in shapes if key.startswith("blocks_")), key=lambda key: int(key[7:])):
        group = sorted(shapes[name]["blocks"]) if "blocks" in shapes[name] else [None]
        repeats = len(jax.tree.leaves(shapes[name])[0].shape) and jax.tree.leaves(shapes[name])[0].shape[0]
        stacked = []
        for place in range(len(group)):
            layers = [
                layer_of(weights, f"model.layers.{first + turn * len(group) + place}.") for turn in range(repeats)
            ]
            stacked.append(jax.tree.map(lambda *ws: np.stack(ws), *layers))
        first += repeats * len(group)
        for found, part in ((params, 0), (biases, 1)):
            own = [trees[part] for trees in stacked]
            found[name] = own[0] if group == [None] else {"blocks": {str(i): tree for i, tree in enumerate(own)}}
    head = {"mix_ODJ": weights["model.hc_head.hc_fn"].T.reshape(4, D, 4), "bias_O": weights["model.hc_head.hc_base"]}
    params["streams_head"] = head | {"scale": weights["model.hc_head.hc_scale"]}
    params["embedding"] = {"table_VD": weights["model.embed_tokens.weight"]}
    params["final_norm"] = {"gain": weights["model.norm.weight"]}
    return params | {"head": {"weight_DV": weights["lm_head.weight"].T}}, biases


@functools.cache
def ours(name):
    """(definition, shapes of the weights) of our model."""
    c = family.Config.from_config(numbers(*SCHEDULES[name]))
    definition, params, _ = split(nnx.eval_shape(lambda: family.Model(c, rngs=nnx.Rngs(0))))
    return definition, params


@functools.cache
def theirs(name):
    return Theirs(*SCHEDULES[name])


@pytest.mark.parametrize("name", SCHEDULES)
def test_logits_and_gradients(name):
    definition, shapes = ours(name)
    them = theirs(name)
    params, biases = tree_of(them.weights, shapes)
    assert jax.tree.map(lambda a: a.shape, shapes) == jax.tree.map(lambda a: a.shape, params)
    ids_BT = np.int32(them.ids.numpy())

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def run(params, biases, ids_BT):
        logits_BTV = bind(definition, params, biases)(ids_BT)
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits_BTV[:, :-1]), ids_BT[:, 1:, None], axis=-1)
        return -jnp.mean(chosen), logits_BTV

    (_, logits_BTV), gradients = jax.device_get(run(params, biases, ids_BT))
    apart = np.abs(logits_BTV - them.logits).max()
    expected, _ = tree_of(them.gradients, shapes)
    worst = {
        jax.tree_util.keystr(path): np.abs(mine - their).max() / max(np.abs(their).max(), 1e-6)
        for (path, mine), their in zip(
            jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
        )
    }
    print(f"{name}: logits {apart:.1e} of {np.abs(them.logits).max():.1f}, gradients {max(worst.values()):.1e}")
    assert apart <= 5e-5
    assert max(worst.values()) <= 1e-4, {name: value for name, value in worst.items() if value > 1e-4}


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_prompt_and_forty_decoded_tokens(name):
    definition, shapes = ours(name)
    them = theirs(name)
    weights = tree_of(them.weights, shapes)
    ids_BT = np.int32(them.ids.numpy())

    @jax.jit
    def prompt(weights, ids_BT):
        model = bind(definition, *weights)
        h_BTD, cache = model.prefill(ids_BT[:, :PROMPT], T)

        def step(cache, at):
            ids_B1 = jax.lax.dynamic_slice_in_dim(ids_BT, at, 1, axis=1)
            logits, cache = model.decode(ids_B1, jnp.full((B, 1), at, jnp.int32), cache)
            return cache, logits[:, 0]

        _, logits = jax.lax.scan(step, cache, jnp.arange(PROMPT, T))
        return model.head(h_BTD), jnp.moveaxis(logits, 0, 1)

    read, decoded = jax.device_get(prompt(weights, ids_BT))
    assert decoded.shape[1] == 40
    apart = [np.abs(read - them.logits[:, :PROMPT]).max(), np.abs(decoded - them.logits[:, PROMPT:]).max()]
    print(f"{name}: prompt {apart[0]:.1e}, decoded {apart[1]:.1e}")
    assert max(apart) <= 5e-5

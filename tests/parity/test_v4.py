"""V4's parts live against those of transformers: hyper-connections, both routers, bounded SwiGLU, shared and routed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deepseek_jax.layers.base import Given, bind
from deepseek_jax.layers.experts import Experts, ExpertsConfig
from deepseek_jax.layers.hyper import HyperConfig, HyperConnection, HyperHead
from deepseek_jax.layers.router import HashRouter, no_balance, softplus_topk
from deepseek_jax.layers.tokens import Tokens

B, T, D, E, F, K, V, LIMIT = 2, 7, 8, 6, 5, 2, 11, 0.4
SIZES = {"hidden_size": D, "moe_intermediate_size": F, "n_routed_experts": E, "num_experts_per_tok": K}
SIZES |= {"vocab_size": V, "num_hidden_layers": 2, "mlp_layer_types": ["hash_moe", "moe"], "swiglu_limit": LIMIT}
SIZES |= {"num_attention_heads": 2, "q_lora_rank": 4, "head_dim": 8, "qk_rope_head_dim": 4, "o_groups": 2}
SIZES |= {"o_lora_rank": 4, "index_n_heads": 2, "index_head_dim": 4, "index_topk": 2, "sliding_window": 3}
SIZES |= {"layer_types": ["sliding_attention"] * 2}


@pytest.fixture(scope="module", autouse=True)
def theirs():
    """transformers' module of V4 and a config of it; on one thread."""
    global torch, v4, config
    torch = pytest.importorskip("torch")
    v4 = pytest.importorskip("transformers.models.deepseek_v4.modeling_deepseek_v4")
    config = v4.DeepseekV4Config(**SIZES)
    config._experts_implementation = "eager"
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


def drawn(module):
    """The module with random numbers in every weight and buffer of floats, biases of routers included."""
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(0.0, 0.5)
    return module


def numpy(tensor):
    return tensor.detach().numpy()


def compare(ours, theirs, gradients):
    """Outputs, and gradients by the names that the caller pairs."""
    np.testing.assert_allclose(ours, numpy(theirs), atol=5e-6)
    for mine, their in gradients:
        scale = np.abs(numpy(their)).max()
        assert scale > 0 and np.abs(mine - numpy(their)).max() <= 1e-4 * scale


def test_hyper_connections():
    module = drawn(v4.DeepseekV4HyperConnection(config))
    c = HyperConfig(n_streams=4, sinkhorn_steps=20, hyper_eps=1e-6, norm_eps=1e-6)
    definition = nnx.split(nnx.eval_shape(lambda: HyperConnection(c, D, rngs=nnx.Rngs(0))))[0]
    x, u, aim = torch.randn(B, T, 4, D, requires_grad=True), torch.randn(B, T, D), torch.randn(B, T, 4, D)
    post, comb, read = module(x)
    written = post.unsqueeze(-1) * u.unsqueeze(-2) + torch.matmul(comb.transpose(-1, -2), x)
    (read * aim[:, :, 0]).sum().backward(retain_graph=True)
    (written * aim).sum().backward()

    def run(params, x, u):
        branch = bind(definition, params, {})
        mine, carry = branch.read(x)
        return mine, branch.write(x, u, carry)

    @jax.jit
    def gradients(params, x, u, aim):
        def loss(params, x):
            mine, streams = run(params, x, u)
            return jnp.sum(mine * aim[:, :, 0]) + jnp.sum(streams * aim)

        return run(params, x, u), jax.grad(loss, (0, 1))(params, x)

    fn = numpy(module.fn).T.reshape(4, D, 24)
    params = {"mix_ODY": fn, "bias_Y": numpy(module.base), "scale": numpy(module.scale)}
    (mine, streams), (d_params, d_x) = jax.device_get(gradients(params, numpy(x), numpy(u), numpy(aim)))
    compare(mine, read, [])
    d_fn = d_params["mix_ODY"].reshape(4 * D, 24).T
    pairs = [(d_fn, module.fn.grad), (d_params["bias_Y"], module.base.grad), (d_params["scale"], module.scale.grad)]
    compare(streams, written, [*pairs, (d_x, x.grad)])


def test_the_head_of_the_streams():
    module, x = drawn(v4.DeepseekV4HyperHead(config)), torch.randn(B, T, 4, D)
    c = HyperConfig(n_streams=4, sinkhorn_steps=20, hyper_eps=1e-6, norm_eps=1e-6)
    definition = nnx.split(nnx.eval_shape(lambda: HyperHead(c, D, rngs=nnx.Rngs(0))))[0]
    params = {"mix_ODJ": numpy(module.hc_fn).T.reshape(4, D, 4), "bias_O": numpy(module.hc_base)}
    params["scale"] = numpy(module.hc_scale)
    compare(jax.jit(lambda p, x: bind(definition, p, {})(x))(params, numpy(x)), module(x), [])


@pytest.mark.parametrize("is_hashed", [False, True])
def test_experts(is_hashed):
    """A layer routed by bias and one by token id, where the bounds of the SwiGLU hold for many numbers."""
    module = drawn(v4.DeepseekV4SparseMoeBlock(config, 0 if is_hashed else 1))
    ids = torch.randint(0, V, (B, T))
    if is_hashed:
        module.gate.tid2eid.copy_(torch.stack([torch.randperm(E)[:K] for _ in range(V)]))
    x, aim = torch.randn(B, T, D, requires_grad=True), torch.randn(B, T, D)
    y = module(x, input_ids=ids)
    (y * aim).sum().backward()

    sizes = ExpertsConfig(E, 1, F, K, route_scale=1.5)
    route = Given(softplus_topk, top_k=K, scale=1.5)
    router = (lambda rngs: HashRouter(V, D, E, K, 0.1, route, rngs=rngs)) if is_hashed else None
    build = lambda: Experts(sizes, D, route, no_balance, router=router, limit=LIMIT, rngs=nnx.Rngs(0))  # noqa: E731
    definition = nnx.split(nnx.eval_shape(build))[0]
    of = lambda get: ours(module, get)  # noqa: E731
    bias = (
        {"experts_VK": np.int32(numpy(module.gate.tid2eid))}
        if is_hashed
        else {"bias_E": numpy(module.gate.e_score_correction_bias)}
    )

    @jax.jit
    def run(params, x):
        def loss(params, x):
            y, found = bind(definition, params, {"router": bias})(x, Tokens.of(np.int32(numpy(ids))))
            return jnp.sum(y * numpy(aim)), (y, found.load_E)

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    (d_params, d_x), (mine, load_E) = jax.device_get(run(of(lambda w: w), numpy(x)))
    expected = of(lambda w: w.grad)
    pairs = zip(jax.tree.leaves(d_params), map(torch.from_numpy, jax.tree.leaves(expected)), strict=True)
    compare(mine, y, [*pairs, (d_x, x.grad)])
    assert load_E.sum() == B * T * K


def ours(module, get):
    """The weights of transformers' layer, or what `get` takes of each, in our tree."""
    array = lambda w: numpy(get(w)).copy()  # noqa: E731
    both, down = array(module.experts.gate_up_proj), array(module.experts.down_proj)
    names = {"gate_DF": "gate_proj", "up_DF": "up_proj", "down_FD": "down_proj"}
    shared = {mine: array(getattr(module.shared_experts, their).weight).T for mine, their in names.items()}
    turned = {"gate_XDF": both[:, :F], "up_XDF": both[:, F:], "down_XFD": down}
    turned = {name: np.swapaxes(w, 1, 2).copy() for name, w in turned.items()}
    return turned | {"router": {"centroids_DE": array(module.gate.weight).T}, "shared": shared}

"""V3.2 live against transformers, over texts longer than top_k: logits, gradients, chosen positions, exports.

transformers has no multi-token prediction for V3.2: the layer's parts are those of V3, and are compared in
test_transformers.py; here an export with one is loaded beside it.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deepseek_jax.convert import hf
from deepseek_jax.layers import indexed_attention
from deepseek_jax.layers.base import bind
from tests.parity.test_transformers import GOLDEN, compare, module_at

T, TOP_K = 40, 9  # a prompt of 8, and 32 decoded tokens
CASES = {"plain": {"num_nextn_predict_layers": 0}, "yarn": {}, "no groups": {"n_group": 1, "topk_group": 1}}
CASES["no groups"] |= {"first_k_dense_replace": 0, "rope_scaling": None}
CASES["plain"] |= {"rope_scaling": None}


@pytest.fixture(scope="module", autouse=True)
def golden():
    global torch, transformers, make_golden
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    make_golden = module_at(GOLDEN / "make_golden.py")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Theirs:
    """A fresh model of transformers, published, and what it says of a text."""

    def __init__(self, changed, directory, seed):
        config = make_golden.CONFIGS["v32"] | {"index_topk": TOP_K} | changed
        model, _ = make_golden.build(config, seed)
        tensors = make_golden.stored(config, make_golden.published(model, None))
        make_golden.assign(model, None, make_golden.read_back(tensors))
        self.ids = torch.randint(2, 64, (2, T), generator=torch.Generator().manual_seed(seed))
        self.chosen, hooks = [], []
        for layer in model.model.layers:
            note = functools.partial(lambda *given: self.chosen.append(given[-1].numpy()))
            hooks.append(layer.self_attn.indexer.register_forward_hook(note))
        logits = model(input_ids=self.ids, use_cache=False).logits
        for hook in hooks:
            hook.remove()
        self.logits = logits.detach().numpy()
        torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), self.ids[:, 1:].flatten()).backward()
        self.gradient = make_golden.published(model, None, of=lambda weight: weight.grad)
        (directory / "config.json").write_text(json.dumps(config))
        make_golden.save_file(tensors, directory / "model.safetensors")
        self.model = compare.in_float32(compare.read(directory))


AGAIN = [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.matrix]) for name in ("plain", "no groups")]


@pytest.fixture(scope="module", params=["yarn", *AGAIN])
def theirs(request, tmp_path_factory):
    return Theirs(CASES[request.param], tmp_path_factory.mktemp("v32"), 7 + len(request.param))


@pytest.fixture(scope="module")
def ours(theirs):
    return compare.whole(theirs.model, np.int32(theirs.ids))


def test_logits_and_the_gradients_of_all_weights_but_the_indexers(theirs, ours):
    assert np.abs(ours["logits"] - theirs.logits).max() <= 2e-5
    gradient = {name: value.numpy() for name, value in theirs.gradient.items()}
    assert ours["gradient"].keys() == gradient.keys()
    worst = max(compare.distance(ours["gradient"][name], gradient[name]) for name in gradient)
    print(f"logits {np.abs(ours['logits'] - theirs.logits).max():.1e}, gradients {worst:.1e}")
    assert worst <= 1e-4


def test_tokens_decoded_across_top_k(theirs):
    decoded, _ = compare.token_by_token(theirs.model, np.int32(theirs.ids))
    apart = np.abs(decoded - theirs.logits[:, compare.PROMPT - 1 :]).max()
    print(f"{T - compare.PROMPT} tokens decoded: {apart:.1e}")
    assert apart <= 2e-5


def test_the_chosen_positions_are_the_same(theirs, monkeypatch):
    """Of every token in every layer, whose inputs are its own model's."""
    noted, among_top = [], indexed_attention.among_top

    def note(*given):
        chosen_BTS = among_top(*given)
        jax.debug.callback(lambda found: noted.append(np.asarray(found)), chosen_BTS, ordered=True)
        return chosen_BTS

    monkeypatch.setattr(indexed_attention, "among_top", note)
    weights = theirs.model.weights

    @jax.jit
    def run(weights, ids_BT):
        return bind(theirs.model.definition, weights["params"], weights["router_bias"])(ids_BT)

    jax.block_until_ready(run(weights, np.int32(theirs.ids)))
    jax.effects_barrier()
    assert len(noted) == 2 * len(theirs.chosen)  # the attention's, and those that the recall counts
    causal = np.tri(T, dtype=bool)
    for layer, indices in enumerate(theirs.chosen):
        chosen = np.zeros((2, T, T), bool)
        np.put_along_axis(chosen, indices.astype(np.int64), True, axis=-1)
        for ours in noted[2 * layer : 2 * layer + 2]:
            np.testing.assert_array_equal(ours, chosen & causal)
            assert ours[:, TOP_K:].sum(-1).min() == TOP_K


def test_transformers_loads_what_we_write(theirs, tmp_path):
    model = theirs.model
    at = tmp_path / "out"
    hf.write(at, model.published.family, model.published.numbers, model.weights, hf.from_tree(model.weights), "fp32")
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        at, dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert type(loaded).__name__ == "DeepseekV32ForCausalLM" and not any(info.values()), info
    with torch.no_grad():
        logits = loaded.eval()(input_ids=theirs.ids).logits.numpy()
    assert np.abs(logits - theirs.logits).max() <= 2e-5
    assert jnp.isfinite(logits).all()

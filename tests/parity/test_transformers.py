"""Live against transformers (needs the extra `parity`): fresh models compute the same here, and exports load there.

The golden files (tests/convert/test_golden.py) do the first without torch; here the numbers are others each time a seed
is changed, and the files are written by us.

    pip install -e ".[test,parity]" && pytest tests/parity
"""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

import deepseek_jax
from deepseek_jax.convert import hf

pytestmark = pytest.mark.filterwarnings("ignore:Initializing zero-element tensors")  # shared experts where none are
GOLDEN = Path(__file__).parent.parent / "golden"
SEED = 100


def module_at(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = module_at(GOLDEN / "compare.py")
LIVE = (  # those of make_golden.SHAPES
    *("prover", "qwen_yarn", "yarn_mscales", "yarn_factor", "moonlight", "kimi", "no_shared", "all_dense"),
    *("dense_mtp", "v2_bare", "v2_all_dense", "moe_bare"),
)
NAMES = (*sorted(path.parent.name for path in GOLDEN.glob("*/config.json")), *LIVE)
AGAIN = (  # the others, and above all v2, v3_mtp, kimi and no_shared, have their mechanisms
    *("qwen_yarn", "yarn_mscales", "moonlight", "dense_mtp", "v2_bare", "v2_all_dense", "moe_bare"),
    *("llm", "v3", "v3_yarn"),
)
CASES = [pytest.param(name, marks=[pytest.mark.slow, pytest.mark.matrix] if name in AGAIN else []) for name in NAMES]
WITHOUT_A_CLASS = ("moe", "moe_bare")


@pytest.fixture(scope="module", autouse=True)
def all_models():
    """name -> config.json. Imports torch, which takes seconds, for these tests alone; on one thread."""
    global torch, transformers, make_golden
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    make_golden = module_at(GOLDEN / "make_golden.py")
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield make_golden.CONFIGS | make_golden.SHAPES
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def fresh(tmp_path_factory, all_models):
    """name -> (directory as published, what transformers says of it); made once."""
    made = {}

    def make(name: str) -> tuple[Path, dict]:
        if not make_golden.can_make(all_models[name]):
            pytest.skip("this transformers has no MtpModel.forward_layer, which computes multi-token prediction")
        if name not in made:
            config, tensors, said = make_golden.made(name, SEED + list(all_models).index(name))
            directory = tmp_path_factory.mktemp(name)
            make_golden.write(directory, config, tensors, said)
            made[name] = directory, said
        return made[name]

    return make


def test_every_model_is_compared(all_models):
    assert set(NAMES) == set(all_models)
    assert {name for name in NAMES if all_models[name]["model_type"] == "deepseek"} == set(WITHOUT_A_CLASS)


@pytest.mark.parametrize("name", CASES)
def test_a_fresh_model_says_what_transformers_says(fresh, name):
    directory, said = fresh(name)
    compare.check(compare.in_float32(compare.read(directory)), said)


@pytest.mark.parametrize("name", [name for name in NAMES if name not in WITHOUT_A_CLASS])
def test_transformers_loads_what_we_write(fresh, name, tmp_path, monkeypatch):
    """No key is missing, unexpected or of another shape, and the logits are the same."""
    directory, said = fresh(name)
    model = compare.read(directory)
    published = model.published
    facts = published.facts
    hf.write(
        *(tmp_path / "out", published.family, published.numbers, model.weights, hf.from_tree(model.weights), "fp32"),
        n_positions=facts.n_positions,
        bos_id=facts.bos_id,
        eos_ids=facts.eos_ids,
        max_shard_bytes=40_000,
    )
    if published.numbers.get("mtp_depth"):  # transformers knows the prediction layer by V3's number of it, 61
        family = transformers.DeepseekV3ForCausalLM
        monkeypatch.setattr(family, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*"])
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, experts_implementation="eager"
    )
    assert type(loaded).__name__ == json.loads((tmp_path / "out" / "config.json").read_text())["architectures"][0]
    assert not any(info.values()), info
    with torch.no_grad():
        logits = loaded.eval()(input_ids=torch.tensor(said["ids"], dtype=torch.long)).logits.numpy()
    assert compare.apart(logits, said["logits"]) <= 2e-5
    assert loaded.config.bos_token_id == facts.bos_id and loaded.config.eos_token_id == facts.eos_ids[0]


# What a release of DeepSeekMoE ships, in short: Llama's attention, and experts one by one under the published names.
CODE = {
    "configuration_deepseek.py": """
from transformers import LlamaConfig
class DeepseekConfig(LlamaConfig):
    model_type = "deepseek"
""",
    "modeling_deepseek.py": """
import copy
import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaMLP
from .configuration_deepseek import DeepseekConfig

def mlp(config, width):
    config = copy.deepcopy(config)
    config.intermediate_size = width
    return LlamaMLP(config)

class MoE(torch.nn.Module):
    def __init__(self, config):
        super().__init__()
        width, self.top_k = config.moe_intermediate_size, config.num_experts_per_tok
        self.gate = torch.nn.Linear(config.hidden_size, config.n_routed_experts, bias=False)
        self.experts = torch.nn.ModuleList(mlp(config, width) for _ in range(config.n_routed_experts))
        self.shared_experts = mlp(config, width * config.n_shared_experts)
    def forward(self, x):
        scores = self.gate(x).softmax(-1)
        chosen = scores.topk(self.top_k, -1).indices
        kept = torch.zeros_like(scores).scatter(-1, chosen, 1.0) * scores
        return self.shared_experts(x) + sum(kept[..., i, None] * e(x) for i, e in enumerate(self.experts))

class DeepseekForCausalLM(LlamaForCausalLM):
    config_class = DeepseekConfig
    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers[config.first_k_dense_replace :]:
            layer.mlp = MoE(config)

DeepseekModel = None
""",
}


def test_the_code_of_a_release_opens_what_we_write(fresh, tmp_path, monkeypatch):
    """DeepSeekMoE has no class in transformers: through auto_map and the files that came along."""
    source, said = fresh("moe")
    for name, text in CODE.items():
        (source / name).write_text(text)
    deepseek_jax.save_pretrained(deepseek_jax.load(source), tmp_path / "out", "fp32")
    monkeypatch.setattr(transformers.dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])
    loaded, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True, trust_remote_code=True
    )
    assert type(loaded).__name__ == "DeepseekForCausalLM" and not any(info.values()), info
    with torch.no_grad():
        logits = loaded.eval()(input_ids=torch.tensor(said["ids"], dtype=torch.long)).logits.numpy()
    assert compare.apart(logits, said["logits"]) <= 2e-5


def test_transformers_reads_prediction_that_we_write(fresh, tmp_path, monkeypatch):
    """Its own reader of the layer of multi-token prediction, from our files."""
    directory, said = fresh("v3_mtp")
    model = compare.read(directory)
    published = model.published
    hf.write(
        *(tmp_path / "out", published.family, published.numbers, model.weights, hf.from_tree(model.weights), "fp32"),
    )
    family = transformers.DeepseekV3ForCausalLM
    monkeypatch.setattr(family, "_keys_to_ignore_on_load_unexpected", [r"model\.layers\.2\..*"])
    loaded = family.from_pretrained(tmp_path / "out", dtype=torch.float32, experts_implementation="eager").eval()
    ahead = make_golden.MtpModel.from_pretrained(loaded).eval()
    ids = torch.tensor(said["ids"], dtype=torch.long)
    with torch.no_grad():
        hidden = loaded.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
        positions = torch.arange(ids.shape[1] - 1)[None].expand(len(ids), -1)
        hidden = ahead.forward_layer(0, hidden, positions, None, input_ids=ids[:, 1:])
        logits = ahead._project_to_logits(hidden).numpy()
    assert compare.apart(logits, said["mtp_logits"]) <= 2e-5


def test_our_bfloat16_export_is_what_was_published(fresh, tmp_path):
    """A directory read and written again holds the same bytes under the same names."""
    directory, _ = fresh("v3_mtp")
    model = compare.read(directory)
    published, get = model.published, hf.from_tree(model.weights)
    hf.write(tmp_path / "out", published.family, published.numbers, model.weights, get, "bf16")
    from safetensors.torch import load_file

    one, other = (load_file(at / "model.safetensors") for at in (directory, tmp_path / "out"))
    assert one.keys() == other.keys()
    assert all(one[name].dtype == other[name].dtype and torch.equal(one[name], other[name]) for name in one)


def test_golden_files_are_what_the_script_makes(tmp_path):
    """Of one model; torch's sums may differ in the last bits from one processor to another."""
    name = "v2"
    make_golden.write(tmp_path, *make_golden.made(name, list(make_golden.CONFIGS).index(name)))
    kept = GOLDEN / name
    made, there = (json.loads((at / "config.json").read_text()) for at in (tmp_path, kept))
    both = made.keys() & there.keys() - {"transformers_version"}  # versions differ in the defaults that they write
    assert {key: made[key] for key in both} == {key: there[key] for key in both}
    assert make_golden.CONFIGS[name].keys() - {"dtype"} <= both
    assert (tmp_path / "model.safetensors").read_bytes() == (kept / "model.safetensors").read_bytes()
    one, other = np.load(tmp_path / "oracle.npz"), np.load(kept / "oracle.npz")
    assert one.files == other.files
    for key in one.files:
        np.testing.assert_allclose(one[key], other[key], atol=1e-5)

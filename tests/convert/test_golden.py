"""Every family computes what transformers computes: logits, gradients, greedy text (see tests/golden/make_golden.py).

Agreement is in float32; only the order of sums differs. MoE-16B, which has no class in transformers, is compared
with Llama's attention and V2's mixture of experts combined.
"""

import importlib.util
import math
from pathlib import Path

import numpy as np
import pytest

from deepseek_jax.convert import names
from deepseek_jax.convert.hf_config import from_hf
from deepseek_jax.convert.safetensors import read_json
from deepseek_jax.layers.rope import Yarn, softmax_scale

GOLDEN = Path(__file__).parent.parent / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def module_at(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


compare = module_at(GOLDEN / "compare.py")


def test_every_kind_is_there():
    kinds = {"coder", "llm", "moe", "r1_llama", "r1_qwen", "r1_qwen3", "v2", "v2_lite", "v3"}
    kinds |= {"v3_mtp", "v3_yarn", "v32"}
    assert set(NAMES) == kinds


def test_the_files_stay_small():
    assert sum(file.stat().st_size for file in GOLDEN.rglob("*") if file.suffix != ".py") < 1.8e6


# slow: they compile experts; matrix: all of their mechanisms are in v3_mtp, coder and v32
MARKS = {name: [pytest.mark.slow] for name in ("moe", "v2", "v2_lite", "v3_mtp", "v32")}
MARKS |= {name: [pytest.mark.slow, pytest.mark.matrix] for name in ("llm", "v3", "v3_yarn")}
CASES = [pytest.param(name, marks=MARKS.get(name, []), id=name) for name in NAMES]


@pytest.mark.parametrize("name", CASES)
def test_we_say_what_transformers_says(name):
    model = compare.load(GOLDEN / name)
    said = dict(np.load(GOLDEN / name / "oracle.npz"))
    trained = [tensor for tensor in names.tensors(model.source.abstract) if tensor.places[0][0][0] == "params"]
    trained = [tensor for tensor in trained if compare.INDEXER not in tensor.name]
    flat, at = said["gradient"], 0
    said["gradient"] = {}
    for tensor in sorted(trained, key=lambda tensor: tensor.name):
        said["gradient"][tensor.name] = flat[at : at + math.prod(tensor.shape)].reshape(tensor.shape)
        at += math.prod(tensor.shape)
    assert at == flat.size
    compare.check(model, said)


def test_softmax_scales_of_the_published_models():
    """In closed form: 192^-0.5 (0.1 mscale ln 40 + 1)^2."""
    rope = {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1}
    for mscale, scale in ((0.707, 0.114721), (1.0, 0.135234)):
        hf = read_json(GOLDEN / "v3_yarn" / "config.json")
        hf["rope_scaling"] = rope | {"mscale": mscale, "mscale_all_dim": mscale}
        yarn = Yarn(**from_hf(hf)[1]["yarn"])
        assert softmax_scale(192, yarn) == pytest.approx(scale, abs=5e-7)

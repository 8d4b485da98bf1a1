"""The engine runs every family: its text is that of the forward pass, and no request compiles a program."""

import numpy as np
import pytest

from deepseek_jax import run_config
from deepseek_jax.serve.engine import Engine
from deepseek_jax.serve.offline import complete
from deepseek_jax.serve.sampling import Sampling
from tests.serve.conftest import SIZES, Network

pytestmark = pytest.mark.slow  # each compiles all programs of its engine

HEADS = {"d_model": 16, "n_layers": 2, "dense_width": 24, "n_heads": 2, "n_kv_heads": 1, "head_width": 8}
LATENT = {name: size for name, size in SIZES.items() if name != "mtp_depth"}
OF_QWEN = HEADS | {"vocab_size": 272}
FAMILIES = {
    "LLM": ("tiny_v1", HEADS),
    "MoE": ("tiny_moe", HEADS | {"n_kv_heads": 2, "n_experts": 8, "expert_width": 8, "top_k": 2}),
    "V2": ("tiny_v2", LATENT | {"n_groups": 4, "top_groups": 2}),
    "V2-Lite": ("tiny_v2_lite", {name: size for name, size in LATENT.items() if name != "q_rank"}),
    "a student of Llama's kind": ("r1_distill_llama_8b", OF_QWEN),
    "a student of Qwen2's kind": ("r1_distill_qwen_1b5", OF_QWEN),
    "a student of Qwen3's kind": ("r1_0528_qwen3_8b", OF_QWEN),
}


IN_ALL_RUNS = ("MoE", "V2", "a student of Qwen2's kind")  # the others compile as many programs of the same layers


@pytest.mark.parametrize(
    "family", [one if one in IN_ALL_RUNS else pytest.param(one, marks=pytest.mark.matrix) for one in FAMILIES]
)
def test_the_text_is_that_of_the_forward_pass_and_no_request_compiles(family, compilations):
    """Prompts of several lengths, one of which is read in two parts; every kind of drawing; log-probabilities."""
    name, numbers = FAMILIES[family]
    config = run_config.load(name)
    config.model.update(numbers)
    config.precision = "fp32"
    network = Network(config)
    options = {"xla_backend_optimization_level": 0}  # compiles in less time
    sizes = {"n_rows": 1, "chunk": 16, "page_size": 8}
    engine = Engine(network.definition, network.weights, 32, **sizes, compiler_options=options)
    engine.compile()
    compilations.clear()
    draw = np.random.default_rng(1)
    prompts = [draw.integers(0, 200, n).tolist() for n in (1, 20, 7, 9)]
    found = complete(engine, prompts, [Sampling(6, logprobs=1, prompt_logprobs=n % 2 == 0) for n in range(4)])
    complete(engine, prompts, [Sampling(5, temperature=1.0, seed=n) for n in range(4)])
    complete(engine, prompts, [Sampling(3, logit_bias={3: 1.0}), Sampling(9), Sampling(2, top_k=4), Sampling(1)])
    assert not compilations
    for prompt, one in zip(prompts, found, strict=True):
        for n in range(6):
            logits = network.last_logits([*prompt, *one.ids[:n]])
            assert logits[one.ids[n]] >= logits.max() - 1e-4

"""R1-Distill-Llama 70B: a Llama 3.3 70B.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature. Sizes from the released config.json.  70.55B parameters.

    deepseek-jax inspect --config=r1_distill_llama_70b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base, r1_distill_llama_8b, r1_distill_qwen_1b5


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "r1_distill_llama_70b"
    config.family = "v1"
    config.model = model()
    return r1_distill_qwen_1b5.recipe(config, peak_rate=2e-5, last_rate=2e-6)


def model() -> ConfigDict:
    """Llama 3.3 70B."""
    m = r1_distill_llama_8b.model()
    m.d_model = 8192
    m.n_layers = 80
    m.dense_width = 28_672
    m.n_heads = 64
    return m

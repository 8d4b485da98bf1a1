"""R1-Distill-Qwen 7B: a Qwen2.5-Math 7B.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature. Sizes from the released config.json.  7.62B parameters.

    deepseek-jax inspect --config=r1_distill_qwen_7b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base, r1_distill_qwen_1b5


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "r1_distill_qwen_7b"
    config.family = "v1"
    config.model = model()
    return r1_distill_qwen_1b5.recipe(config, peak_rate=8e-5, last_rate=8e-6)


def model() -> ConfigDict:
    """Qwen2.5-Math 7B."""
    m = r1_distill_qwen_1b5.model()
    m.vocab_size = 152_064
    m.d_model = 3584
    m.n_layers = 28
    m.dense_width = 18_944
    m.n_heads = 28
    m.n_kv_heads = 4
    return m

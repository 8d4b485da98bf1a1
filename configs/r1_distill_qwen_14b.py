"""R1-Distill-Qwen 14B: a Qwen2.5 14B.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature. Sizes from the released config.json.  14.77B parameters.

    deepseek-jax inspect --config=r1_distill_qwen_14b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base, r1_distill_qwen_1b5


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "r1_distill_qwen_14b"
    config.family = "v1"
    config.model = model()
    return r1_distill_qwen_1b5.recipe(config, peak_rate=7e-5, last_rate=7e-6)


def model() -> ConfigDict:
    """Qwen2.5 14B."""
    m = r1_distill_qwen_1b5.model()
    m.vocab_size = 152_064
    m.d_model = 5120
    m.n_layers = 48
    m.dense_width = 13_824
    m.n_heads = 40
    m.n_kv_heads = 8
    m.rope_base = 1_000_000.0
    m.norm_eps = 1e-5
    return m

"""R1-Distill-Qwen 32B: a Qwen2.5 32B.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature. Sizes from the released config.json.  32.76B parameters.

    deepseek-jax inspect --config=r1_distill_qwen_32b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base, r1_distill_qwen_1b5, r1_distill_qwen_14b


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "r1_distill_qwen_32b"
    config.family = "v1"
    config.model = model()
    return r1_distill_qwen_1b5.recipe(config, peak_rate=6e-5, last_rate=6e-6)


def model() -> ConfigDict:
    """Qwen2.5 32B."""
    m = r1_distill_qwen_14b.model()
    m.n_layers = 64
    m.dense_width = 27_648
    return m

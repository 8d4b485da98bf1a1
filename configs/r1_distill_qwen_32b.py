"""R1-Distill-Qwen 32B: a Qwen2.5 32B.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature.  Sizes from the released config.json.  32.76B parameters.

    deepseek-jax inspect --config=r1_distill_qwen_32b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_distill_qwen_14b


def get_config() -> ConfigDict:
    """The published sizes; the recipe's rate, from which it falls to a tenth along a cosine."""
    config = r1_distill_qwen_14b.get_config()
    config.name = "r1_distill_qwen_32b"

    m = config.model
    m.n_layers = 64
    m.dense_width = 27_648

    config.schedule.peak_rate = 6e-5
    config.schedule.tail_rate = config.schedule.final_rate = 6e-6
    return config

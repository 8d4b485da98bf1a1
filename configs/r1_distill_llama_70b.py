"""R1-Distill-Llama 70B: a Llama 3.3 70B.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature.  Sizes from the released config.json.  70.55B parameters.

    deepseek-jax inspect --config=r1_distill_llama_70b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_distill_llama_8b


def get_config() -> ConfigDict:
    """The published sizes; the recipe's rate, from which it falls to a tenth along a cosine."""
    config = r1_distill_llama_8b.get_config()
    config.name = "r1_distill_llama_70b"

    m = config.model
    m.d_model = 8192
    m.n_layers = 80
    m.dense_width = 28_672
    m.n_heads = 64

    config.schedule.peak_rate = 2e-5
    config.schedule.tail_rate = config.schedule.final_rate = 2e-6
    return config

"""R1-Distill-Llama 8B: a Llama 3.1 8B, with that model's context extension.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature.  Sizes from the released config.json.  8.03B parameters.

    deepseek-jax inspect --config=r1_distill_llama_8b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_distill_qwen_1b5


def get_config() -> ConfigDict:
    """The published sizes; the recipe's rate, from which it falls to a tenth along a cosine."""
    config = r1_distill_qwen_1b5.get_config()
    config.name = "r1_distill_llama_8b"

    m = config.model
    m.vocab_size = 128_256
    m.d_model = 4096
    m.n_layers = 32
    m.dense_width = 14_336
    m.n_heads = 32
    m.n_kv_heads = 8
    m.attention_bias = False
    m.rope_base = 500_000.0
    m.norm_eps = 1e-5
    m.rope_llama3 = ConfigDict()
    m.rope_llama3.factor = 8.0
    m.rope_llama3.low_freq_factor = 1.0
    m.rope_llama3.high_freq_factor = 4.0
    m.rope_llama3.original_length = 8192

    config.schedule.peak_rate = 5e-5
    config.schedule.tail_rate = config.schedule.final_rate = 5e-6
    return config

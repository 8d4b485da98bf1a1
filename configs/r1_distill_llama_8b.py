"""R1-Distill-Llama 8B: a Llama 3.1 8B, with that model's context extension.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature. Sizes from the released config.json.  8.03B parameters.

    deepseek-jax inspect --config=r1_distill_llama_8b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base, r1_distill_qwen_1b5


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "r1_distill_llama_8b"
    config.family = "v1"
    config.model = model()
    return r1_distill_qwen_1b5.recipe(config, peak_rate=5e-5, last_rate=5e-6)


def model() -> ConfigDict:
    """Llama 3.1 8B."""
    m = ConfigDict()
    m.vocab_size = 128_256
    m.d_model = 4096
    m.n_layers = 32
    m.dense_width = 14_336
    m.n_heads = 32
    m.n_kv_heads = 8
    m.head_width = 128
    m.attention_bias = False
    m.qk_norm = False
    m.rope_base = 500_000.0
    m.rope_factor = 1.0
    m.rope_llama3 = ConfigDict()
    m.rope_llama3.factor = 8.0
    m.rope_llama3.low_freq_factor = 1.0
    m.rope_llama3.high_freq_factor = 4.0
    m.rope_llama3.original_length = 8192
    m.yarn = ConfigDict()  # none
    m.norm_eps = 1e-5
    m.init_std = 0.02
    return m

"""DeepSeek-R1-0528-Qwen3 8B: a Qwen3 8B Base, with norms of queries and keys, and YaRN from 32K to 128K tokens.

Supervised on what R1-0528 wrote; neither its data nor its recipe is published, so the recipe here is that of R1's first
students (`r1_distill_qwen_7b`). Sizes from the released config.json.  8.19B parameters.

    deepseek-jax inspect --config=r1_0528_qwen3_8b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base, r1_distill_qwen_1b5


def get_config() -> ConfigDict:
    """The published sizes; the recipe of a student of R1 with about as many parameters."""
    config = base.get_config()
    config.name = "r1_0528_qwen3_8b"
    config.family = "v1"
    config.model = model()
    return r1_distill_qwen_1b5.recipe(config, peak_rate=8e-5, last_rate=8e-6)


def model() -> ConfigDict:
    """Qwen3 8B."""
    m = r1_distill_qwen_1b5.model()
    m.vocab_size = 151_936
    m.d_model = 4096
    m.n_layers = 36
    m.dense_width = 12_288
    m.n_heads = 32
    m.n_kv_heads = 8
    m.attention_bias = False
    m.qk_norm = True
    m.rope_base = 1_000_000.0
    m.yarn.factor = 4.0
    m.yarn.original_length = 32_768
    m.yarn.mscale_all_dim = 0.0  # the rotated values take all of the temperature
    return m

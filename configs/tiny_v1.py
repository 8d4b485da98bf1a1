"""A DeepSeek LLM small enough for two CPU cores: 4 layers, 2 key-value heads for 4 heads.

Learns CPython's standard library byte by byte, as `tiny_v3` does: 420 steps end at 2.80 bits per byte of held-out text.

    deepseek-jax train --config=tiny_v1
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import llm_67b, tiny_v3


def get_config() -> ConfigDict:
    """Returns the laptop twin of `llm_67b`."""
    config = llm_67b.get_config()
    config.name = "tiny_v1"

    m = config.model
    m.vocab_size = 272  # 256 bytes and the special tokens
    m.d_model = 128
    m.n_layers = 4
    m.dense_width = 384
    m.n_heads = 4
    m.n_kv_heads = 2
    m.head_width = 32
    m.init_std = 0.02
    return tiny_v3.recipe(config)

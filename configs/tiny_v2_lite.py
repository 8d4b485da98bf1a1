"""A DeepSeek-V2-Lite small enough for two CPU cores: no query latent, no groups.

Learns CPython's standard library byte by byte, with the text, steps and learning rates of `tiny_v3`.

    deepseek-jax train --config=tiny_v2_lite
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v3, v2_lite


def get_config() -> ConfigDict:
    """Returns the laptop twin of `v2_lite`."""
    config = tiny_v3.get_config()
    config.name = "tiny_v2_lite"
    config.family = v2_lite.get_config().family

    m = config.model = v2_lite.get_config().model
    m.vocab_size = 272  # 256 bytes and the special tokens
    m.d_model = 128
    m.n_layers = 4
    m.dense_width = 384
    m.n_heads = 4
    m.kv_rank = 32
    m.nope_width = 32
    m.rope_width = 16
    m.value_width = 32
    m.n_experts = 16
    m.expert_width = 64
    m.top_k = 4
    m.init_std = 0.02

    config.loss.mtp_weight = config.loss.mtp_weight_final = 0.0
    config.loss.balance_rate = 0.0
    config.loss.auxiliary.expert_balance = 0.01
    return config

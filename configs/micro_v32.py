"""`micro_v3` with V3.2's sparse attention, 64 of 256 positions, for comparing training speed on a CPU.

deepseek-jax bench train --config=micro_v32
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import micro_v3, v32_671b


def get_config() -> ConfigDict:
    """`micro_v3` and an indexer of 4 heads of width 32."""
    config = v32_671b.indexer(micro_v3.get_config())
    config.name = "micro_v32"
    config.family = "v32"

    m = config.model
    m.index_heads = 4
    m.index_width = 32
    m.index_top_k = 64
    return config

"""A V3.2 small enough for two CPU cores: `tiny_v3` whose tokens attend to 64 of 256 positions.

Its indexer learns beside it, from the first step on.

deepseek-jax train --config=tiny_v32
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v3, v32_671b


def get_config() -> ConfigDict:
    """Returns the laptop twin of `v32_671b`."""
    config = v32_671b.indexer(tiny_v3.get_config())
    config.name = "tiny_v32"
    config.family = "v32"

    m = config.model
    m.index_heads = 4
    m.index_width = 32
    m.index_top_k = 64
    return config

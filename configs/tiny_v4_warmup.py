"""The warm-up of V4's indexer in miniature: that of `tiny_v4_dense` learns from its attention; texts twice as long.

deepseek-jax train --config=tiny_v4_warmup --config.run.init_from=runs/tiny_v4_dense
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v4, v4_16k, v32_warmup


def get_config() -> ConfigDict:
    """Returns the recipe of `v4_warmup`, shorter."""
    config = v4_16k.longer(tiny_v4.get_config(), 512)
    config.name = "tiny_v4_warmup"
    return v32_warmup.recipe(config, steps=100, rate=1e-3)

"""The first stage of V3.2 in miniature: the indexer of `tiny_v32` learns from the attention of a `tiny_v3`.

deepseek-jax train --config=tiny_v32_warmup --config.run.init_from=runs/tiny_v3
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v32, v32_warmup


def get_config() -> ConfigDict:
    """Returns the recipe of `v32_warmup`, shorter."""
    config = tiny_v32.get_config()
    config.name = "tiny_v32_warmup"
    return v32_warmup.recipe(config, steps=200, rate=1e-3)

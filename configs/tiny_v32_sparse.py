"""The second stage of V3.2 in miniature: `tiny_v32` continues with the weights of `tiny_v32_warmup`.

deepseek-jax train --config=tiny_v32_sparse --config.run.init_from=runs/tiny_v32_warmup
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v32, v32_warmup


def get_config() -> ConfigDict:
    """Returns the recipe of `v32_sparse`, shorter, at the last rate of `tiny_v3`."""
    config = tiny_v32.get_config()
    config.name = "tiny_v32_sparse"
    config.loss.balance_rate = 0.0
    return v32_warmup.constant(config, steps=300, rate=3e-4)

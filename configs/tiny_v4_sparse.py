"""V4's stage of sparse attention in miniature: `tiny_v4` continues with the weights of `tiny_v4_warmup`.

deepseek-jax train --config=tiny_v4_sparse --config.run.init_from=runs/tiny_v4_warmup
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v4, v4_16k, v32_warmup


def get_config() -> ConfigDict:
    """Returns the recipe of `v4_64k`, shorter, at the last rate of `tiny_v4`."""
    config = v4_16k.longer(tiny_v4.get_config(), 512)
    config.name = "tiny_v4_sparse"
    config.loss.balance_rate_stop = 0
    return v32_warmup.constant(config, steps=200, rate=config.schedule.tail_rate)

"""V4-Flash's last stage: a million tokens by YaRN, factor 16 over 64K, sparse attention; after `v4_64k`.

Paper: arXiv 2606.19348, section 4.2: the last rate, 2.7e-5. Its 1T tokens are a guess, as `v4_64k` says.

    deepseek-jax train --config=v4_1m --config.run.init_from=RUN
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v4_16k, v4_flash_284b, v32_warmup


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = v4_flash_284b.get_config()
    config.name = "v4_1m"
    v4_16k.longer(config, 1_048_576)
    return v32_warmup.constant(config, steps=13_250, rate=config.schedule.tail_rate)

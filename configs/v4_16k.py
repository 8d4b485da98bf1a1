"""V4-Flash's second stage: 16K tokens, dense attention, after `v4_dense`.

Paper: arXiv 2606.19348, section 4.2; the rest of the first trillion tokens. See `v4_dense` for what is not published.

    deepseek-jax train --config=v4_16k --config.run.init_from=RUN
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v4_dense, v4_flash_284b


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = v4_flash_284b.get_config()
    config.name = "v4_16k"
    return v4_dense.recipe(longer(config, 16_384), steps=2650)


def longer(config: ConfigDict, seq_len: int) -> ConfigDict:
    """Longer sequences, fewer of them: as many tokens per step."""
    config.batch.size = config.batch.size * config.data.seq_len // seq_len
    config.data.seq_len = seq_len
    return config

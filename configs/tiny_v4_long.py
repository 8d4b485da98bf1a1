"""V4's longest texts in miniature: 2,048 tokens in place of 512, by YaRN, after `tiny_v4_sparse`.

deepseek-jax train --config=tiny_v4_long --config.run.init_from=runs/tiny_v4_sparse
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v4_sparse, v4_16k, v32_warmup


def get_config() -> ConfigDict:
    """Returns the recipe of `v4_1m`, shorter."""
    config = v4_16k.longer(tiny_v4_sparse.get_config(), 2048)
    config.name = "tiny_v4_long"
    config.model.yarn = ConfigDict({"factor": 4.0, "original_length": 512})
    return v32_warmup.constant(config, steps=50, rate=config.schedule.tail_rate)

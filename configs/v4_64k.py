"""V4-Flash's fourth stage and by far the longest: 64K tokens, sparse attention, all weights learn; after `v4_warmup`.

Paper: arXiv 2606.19348, section 4.2: a constant rate of 2.7e-4, at the end a cosine to 2.7e-5; multi-token prediction
weighs 0.3, and 0.1 from the beginning of the cosine on. Of the 32T tokens, 30T here: how many the stages of 64K and 1M
have, and how long the cosine takes, is not published.

    deepseek-jax train --config=v4_64k --config.run.init_from=RUN
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v4_16k, v4_dense, v4_flash_284b


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = v4_flash_284b.get_config()
    config.name = "v4_64k"
    config.model.yarn = ConfigDict()
    tail_rate = config.schedule.tail_rate
    v4_dense.constant(v4_16k.longer(config, 65_536), steps=397_000)
    schedule = config.schedule
    schedule.constant_steps, schedule.cosine_steps = 347_000, 50_000
    schedule.tail_rate = schedule.final_rate = tail_rate
    config.loss.mtp_weight_switch = schedule.constant_steps
    return config

"""V4-Flash's third stage: 64K tokens, the indexer alone learns from the attention, which is dense for a last time.

Paper: arXiv 2606.19348, section 4.2: a short warm-up of the indexer when attention becomes sparse. Length, batch and
rate are not published: here V3.2's, 1,000 steps of 2.1M tokens at 1e-3 (arXiv 2512.02556, section 2.1.1). Nor is the
indexer's loss: here V3.2's, over entries in place of tokens.

    deepseek-jax train --config=v4_warmup --config.run.init_from=RUN
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v4_flash_284b, v32_warmup


def get_config() -> ConfigDict:
    """Returns the recipe."""
    config = v4_flash_284b.get_config()
    config.name = "v4_warmup"
    config.model.yarn = ConfigDict()
    config.data.seq_len, config.batch.size = 65_536, 32
    config.loop.eval_every = config.checkpoint.every = 100  # of few steps
    return v32_warmup.recipe(config, steps=1000, rate=1e-3)

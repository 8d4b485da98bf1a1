"""V4-Flash's first stage: 4K tokens, dense attention: tokens of CSA layers read all entries, and no indexer learns.

Paper: arXiv 2606.19348, section 4.2: 1T tokens with dense attention, then sparse at 64K, after a short warm-up of the
indexer, until the end; lengths 4K, 16K, 64K, 1M; warm-up of 2,000 steps to 2.7e-4. The stages are this one, `v4_16k`,
`v4_warmup` (the indexer at 64K), `v4_64k` and `v4_1m`, each of which begins with the run before, and with new moments.

Not published: how the trillion tokens divide between 4K and 16K, here 0.8T and 0.2T; how the batch grows to its 75.5M
tokens, here it does not; whether the rotary base of entries had YaRN before 1M, here it had none; that indexers rest
until their warm-up, which initialises them, is what this file makes of it.

V4-Pro (33T tokens, steps of 94.4M, a rate of 2.0e-4, a longer dense stage of unpublished length) takes the same
functions: `v4_dense.recipe(v4_pro_1t6.get_config(), steps=…)`.

    deepseek-jax train --config=v4_dense
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v4_flash_284b


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = v4_flash_284b.get_config()
    config.name = "v4_dense"
    return recipe(config, steps=10_600, warmup_steps=2000)


def recipe(config: ConfigDict, steps: int, warmup_steps: int = 0) -> ConfigDict:
    """Dense attention at a constant rate; indexers rest, for nothing reads them and their loss has weight 0."""
    config.model.index_dense = True
    config.loss.auxiliary.index_kl = 0.0
    config.model.yarn = ConfigDict()
    return constant(config, steps, warmup_steps)


def constant(config: ConfigDict, steps: int, warmup_steps: int = 0) -> ConfigDict:
    """The peak rate, and the first weight of multi-token prediction, to the end."""
    config.loop.steps = steps
    config.loss.mtp_weight_switch = steps
    schedule = config.schedule
    schedule.warmup_steps, schedule.constant_steps = warmup_steps, steps - warmup_steps
    schedule.cosine_steps = schedule.tail_steps = 0
    schedule.tail_rate = schedule.final_rate = schedule.peak_rate
    return config

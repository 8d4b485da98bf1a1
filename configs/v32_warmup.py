"""The first stage of V3.2: the indexer alone learns from the attention, which stays dense.

Paper: arXiv 2512.02556, section 2.1.1: begins with V3.1-Terminus at 128K tokens, all else frozen; 1,000 steps
of 16 sequences, 2.1B tokens, at a rate of 1e-3. The loss of the language model is computed and logged; no gradient of
it reaches an indexer. Expect index_recall, the share of the attention's weights that the indexer would keep, to rise.

    deepseek-jax train --config=v32_warmup --config.run.init_from=deepseek-ai/DeepSeek-V3.1-Terminus
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v32_671b


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = v32_671b.get_config()
    config.name = "v32_warmup"
    config.data.seq_len = 131_072
    config.batch.size, config.batch.size_start, config.batch.ramp_steps = 16, 0, 0
    config.loop.eval_every = config.checkpoint.every = 100  # of few steps
    return recipe(config, steps=1000, rate=1e-3)


def recipe(config: ConfigDict, steps: int, rate: float) -> ConfigDict:
    """The indexer is initialised at random and learns alone, at a constant rate."""
    config.model.index_dense = True
    config.run.anew = "indexer"
    config.loss.trained = "indexer"
    config.loss.balance_rate = 0.0
    config.loss.auxiliary.expert_balance = 0.0
    return constant(config, steps, rate)


def constant(config: ConfigDict, steps: int, rate: float) -> ConfigDict:
    """A constant learning rate."""
    config.loop.steps = steps
    config.loss.mtp_weight = config.loss.mtp_weight_final
    schedule = config.schedule
    schedule.peak_rate = schedule.tail_rate = schedule.final_rate = rate
    schedule.warmup_steps, schedule.constant_steps, schedule.cosine_steps, schedule.tail_steps = 0, steps, 0, 0
    return config

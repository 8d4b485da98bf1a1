"""V3's context extension, first phase: from 4,096 to 32,768 tokens by YaRN, after pre-training.

Paper: arXiv 2412.19437, section 4.3: 1,000 steps of 1,920 sequences at the last rate of pre-training, 7.3e-6; scale 40,
alpha 1, beta 32 and the factor 0.1 ln 40 + 1 in both phases, on the keys' decoupled part alone. The second phase is
`v3_128k`, which begins with this run.

    deepseek-jax train --config=v3_32k --config.run.init_from=RUN
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_sft, v3_671b


def get_config() -> ConfigDict:
    """The published recipe."""
    config = v3_671b.get_config()
    config.name = "v3_32k"
    config.model.yarn = r1_sft.yarn()
    config.data.seq_len = 32_768
    config.batch.size = 1920
    config.batch.size_start = config.batch.ramp_steps = 0
    config.loop.steps = 1000
    config.loop.eval_every = config.checkpoint.every = 100
    loss = config.loss
    loss.mtp_weight = loss.mtp_weight_final  # as at the end of pre-training, like the router biases, which are frozen
    loss.balance_rate = 0.0
    schedule = config.schedule
    schedule.peak_rate = schedule.tail_rate = schedule.final_rate = 7.3e-6
    schedule.warmup_steps = schedule.cosine_steps = schedule.tail_steps = 0
    schedule.constant_steps = config.loop.steps
    return config

"""R1's supervised fine-tuning of V3's base model, on 800K conversations.

Paper: arXiv 2501.12948 and its supplement: rate 5e-5 to 5e-6 along a cosine, 32,768 tokens, batches of 128, two to
three epochs. It is the recipe of the cold start (thousands of long thoughts) and of the 600K reasoning and 200K other
answers after rejection sampling (section 2.3). An epoch is 6,250 steps if a conversation fills a sequence; packed ones
need fewer: set loop.steps and schedule.cosine_steps to what the first lines of the run say.

    deepseek-jax sft --config=r1_sft --config.run.init_from=deepseek-ai/DeepSeek-V3-Base --config.data.source=FILES
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_671b


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = recipe(v3_671b.get_config())
    config.name = "r1_sft"
    config.model.yarn = yarn()
    config.data.chat_template = "r1"
    config.data.seq_len = 32_768
    config.batch.size = 128
    config.loop.steps = config.schedule.cosine_steps = 12_500  # two epochs
    config.schedule.peak_rate, config.schedule.tail_rate, config.schedule.final_rate = 5e-5, 5e-6, 5e-6
    return config


def yarn() -> ConfigDict:
    """The context extension of the released V3 and V3-Base, from 4,096 to 128K tokens (V3 section 4.3)."""
    y = ConfigDict()
    y.factor = 40.0
    y.original_length = 4096
    y.beta_fast, y.beta_slow = 32.0, 1.0
    y.mscale = y.mscale_all_dim = 1.0
    return y


def recipe(config: ConfigDict) -> ConfigDict:
    """What V3's and R1's fine-tuning have in common: conversations, the rate along a cosine, router biases at rest."""
    config.data.format = "conversations"
    config.data.source = "conversations/*.jsonl"  # give yours
    config.data.mask_documents = True  # V3 section 5.1: packed samples do not see one another
    config.data.fim_rate = 0.0
    config.batch.size_start = config.batch.ramp_steps = 0
    config.loop.eval_every = config.checkpoint.every = 250
    config.loss.mtp_weight = config.loss.mtp_weight_final = 0.1  # not given; the last value of pre-training
    config.loss.mtp_weight_switch = 1_000_000_000
    config.loss.balance_rate = 0.0  # likewise
    config.loss.balance_rate_stop = 1_000_000_000
    schedule = config.schedule
    schedule.warmup_steps = schedule.constant_steps = schedule.tail_steps = 0
    return config

"""DeepSeek-Coder 1.3B: rotary base 100,000 and angles divided by 4, for contexts of 16K; half the documents FIM.

Paper: arXiv 2401.14196, table 2 and section 3: 2T tokens, batch 1,024, learning rate 5.3e-4 in three stages, each
sqrt(1/10) of the one before; sizes from the released config.json. The rotary numbers are the released ones, those of
the extension to 16K (1,000 more steps); sequences have the 4,096 tokens of the training before it.

    deepseek-jax inspect --config=coder_1b3
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import llm_7b


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = llm_7b.get_config()
    config.name = "coder_1b3"

    m = config.model
    m.vocab_size = 32_256
    m.d_model = 2048
    m.n_layers = 24
    m.dense_width = 5504
    m.n_heads = 16
    m.n_kv_heads = 16
    m.rope_base = 100_000.0
    m.rope_factor = 4.0

    config.data.fim_rate = 0.5

    config.loop.steps = 476_837  # 2T tokens
    config.batch.size = 1024

    schedule = config.schedule
    schedule.peak_rate = 5.3e-4
    schedule.constant_steps = 379_470  # the paper does not say where the stages end; here 80 and 90 %
    schedule.tail_rate = 1.676e-4
    schedule.tail_steps = 47_684
    schedule.final_rate = 5.3e-5
    return config

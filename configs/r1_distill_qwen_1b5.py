"""R1-Distill-Qwen 1.5B: a Qwen2.5-Math 1.5B, with biases in its attention.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature.  Sizes from the released config.json.  1.78B parameters.

    deepseek-jax inspect --config=r1_distill_qwen_1b5
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import llm_7b


def get_config() -> ConfigDict:
    """The published sizes; the recipe's rate, from which it falls to a tenth along a cosine."""
    config = llm_7b.get_config()
    config.name = "r1_distill_qwen_1b5"

    m = config.model
    m.vocab_size = 151_936
    m.d_model = 1536
    m.n_layers = 28
    m.dense_width = 8960
    m.n_heads = 12
    m.n_kv_heads = 2
    m.attention_bias = True
    m.init_std = 0.02

    config.data.seq_len = 32_768
    config.batch.size_start = config.batch.size = 64
    config.loop.steps = 25_000  # two epochs

    schedule = config.schedule
    schedule.warmup_steps = 0
    schedule.constant_steps = 0
    schedule.cosine_steps = config.loop.steps
    schedule.tail_steps = 0
    schedule.peak_rate = 1e-4
    schedule.tail_rate = schedule.final_rate = 1e-5
    return config

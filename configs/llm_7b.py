"""DeepSeek LLM 7B: multi-head attention, 30 layers, 6.91B parameters.

Paper: arXiv 2401.02954, table 2 (sizes) and section 2.3 (recipe): 2T tokens, sequences of 4,096, batch 2,304, learning
rate 4.2e-4 after 2,000 steps of warm-up, times 0.316 at 80 % and 0.1 at 90 % of the tokens.

    deepseek-jax plan --config=llm_7b --devices=256 --config.sharding.embed=data --config.pipeline.micro_batches=9
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "llm_7b"
    config.family = "v1"
    config.precision = "bf16"

    m = config.model
    m.vocab_size = 102_400
    m.d_model = 4096
    m.n_layers = 30
    m.dense_width = 11_008
    m.n_heads = 32
    m.n_kv_heads = 32
    m.head_width = 128
    m.attention_bias = False
    m.qk_norm = False
    m.rope_base = 10_000.0
    m.rope_factor = 1.0
    m.rope_llama3 = ConfigDict()  # none
    m.yarn = ConfigDict()  # none
    m.norm_eps = 1e-6
    m.init_std = 0.006

    data = config.data
    data.tokenizer = "tokenizer.json"
    data.source = "corpus/*.array_record"
    data.seq_len = 4096
    data.fim_rate = 0.0

    config.loop.steps = 211_928  # 2T tokens
    config.batch.size = 2304
    config.run.remat = "block"
    config.loss.mtp_weight = config.loss.mtp_weight_final = 0.0
    config.loss.balance_rate = config.loss.auxiliary.expert_balance = 0.0

    schedule = config.schedule
    schedule.peak_rate = 4.2e-4
    schedule.warmup_steps = 2000
    schedule.constant_steps = 167_542  # to 80 %
    schedule.cosine_steps = 0
    schedule.tail_rate = 1.327e-4  # 4.2e-4 * 0.316
    schedule.tail_steps = 21_193  # to 90 %
    schedule.final_rate = 4.2e-5
    return config

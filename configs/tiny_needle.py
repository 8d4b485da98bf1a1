"""Retrieval in miniature: a V3.2 of 0.2M parameters learns to find a number in a long text, by 32 of 136 positions.

It reads texts of 96 characters, each with one sentence that says a code and a question for it at the end
(`deepseek_jax/rl/needle.py`); only the answers are learnt.

    deepseek-jax sft --config=tiny_needle
    deepseek-jax evaluate --workdir=runs/tiny_needle --problems=needle:96@50 --samples=0 --max-tokens=8
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_sums, v32_671b


def get_config() -> ConfigDict:
    """Returns the recipe: 1,500 steps of 32 texts, after which all of 512 held-out needles are found."""
    config = v32_671b.indexer(tiny_sums.get_config())
    config.name = "tiny_needle"
    config.family = "v32"
    config.model.rope_base = 1000.0  # for sequences of some 130 tokens
    config.model.index_heads, config.model.index_width, config.model.index_top_k = 4, 16, 32
    config.data.source = "needle:96"
    config.data.seq_len = 136

    config.loop.steps = 1500
    config.loop.eval_every = config.checkpoint.every = 500
    config.loss.balance_rate_stop = 1200

    schedule = config.schedule
    schedule.warmup_steps, schedule.constant_steps, schedule.cosine_steps = 50, 1150, 300
    return config

"""The second stage of V3.2: all weights learn with sparse attention, the indexer from the chosen positions alone.

Paper: arXiv 2512.02556, section 2.1.1: begins with what `v32_warmup` has made; 15,000 steps of 480 sequences of 128K
tokens, 943.7B tokens, at a rate of 7.3e-6, 2,048 positions per token. The language model's loss moves all weights but
the indexers', whose only loss is the KL divergence. Weights of the balance loss and of multi-token prediction are not
given: V3's last ones here. Nor is it given how gradients are clipped: here by the norm of all together
(config.loss.clip_norm), so that where an indexer's gradients are large the other weights move less.

    deepseek-jax train --config=v32_sparse --config.run.init_from=runs/v32_warmup
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v32_671b, v32_warmup


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = v32_671b.get_config()
    config.name = "v32_sparse"
    config.data.seq_len = 131_072
    config.batch.size, config.batch.size_start, config.batch.ramp_steps = 480, 0, 0
    config.loss.balance_rate = 0.0
    return v32_warmup.constant(config, steps=15_000, rate=7.3e-6)

"""DeepSeek-V3.2, 672B parameters, of which 37B are active per token: V3.1 with sparse attention.

Paper: arXiv 2512.02556. It begins with the weights of V3.1-Terminus at 128K tokens: 2.1B tokens for the indexer alone
(`v32_warmup`), then 944B for all weights (`v32_sparse`). Here are the sizes, at a length of 4,096.

    deepseek-jax plan --config=v32_671b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_671b


def get_config() -> ConfigDict:
    """The published sizes."""
    config = v3_671b.get_config()
    config.name = "v32_671b"
    config.family = "v32"
    indexer(config)

    m = config.model
    m.index_heads = 64
    m.index_width = 128
    m.index_top_k = 2048
    m.yarn = ConfigDict({"factor": 40.0, "original_length": 4096})
    return config


def indexer(config: ConfigDict) -> ConfigDict:
    """What every run with an indexer sets: how it learns, and that its recall is logged."""
    config.model.index_dense = False
    config.loss.auxiliary.index_kl = 1.0
    config.loss.auxiliary.index_recall = 0.0  # a figure of the log, nothing to be minimised
    return config

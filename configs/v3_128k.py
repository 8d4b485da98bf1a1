"""V3's context extension, second phase: from 32,768 to 131,072 tokens, after `v3_32k`.

Paper: arXiv 2412.19437, section 4.3: 1,000 steps of 480 sequences, everything else as in the first phase. What a model
finds in its context afterwards: deepseek-jax evaluate --workdir=RUN --problems=needle:100000@50

    deepseek-jax train --config=v3_128k --config.run.init_from=RUN
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_32k


def get_config() -> ConfigDict:
    """The published recipe."""
    config = v3_32k.get_config()
    config.name = "v3_128k"
    config.data.seq_len = 131_072
    config.batch.size = 480
    return config

"""V4's stages of dense attention in miniature: `tiny_v4` without a choice among entries.

Three more follow, each from the run before: `tiny_v4_warmup`, `tiny_v4_sparse`, `tiny_v4_long`.

    deepseek-jax train --config=tiny_v4_dense
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import tiny_v4


def get_config() -> ConfigDict:
    """Returns `tiny_v4` with dense attention."""
    config = tiny_v4.get_config()
    config.name = "tiny_v4_dense"
    config.model.index_dense = True
    config.loss.auxiliary.index_kl = 0.0
    return config

"""DeepSeek-V3.2-Exp: the network of V3.2, trained with V3.1's post-training, so that the two can be compared.

Paper: "DeepSeek-V3.2-Exp: Boosting Long-Context Efficiency with DeepSeek Sparse Attention", 2025. Indexers of its first
code rotated other pairs than they were trained with; here is the corrected one.

    deepseek-jax inspect --config=v32_exp
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v32_671b


def get_config() -> ConfigDict:
    """The published sizes."""
    config = v32_671b.get_config()
    config.name = "v32_exp"
    return config

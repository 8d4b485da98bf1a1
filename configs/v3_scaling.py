"""V3 at its published widths with eight layers of experts: for measuring how training scales over devices.

Cut to what one H200 trains alone, for it is what several are compared with: 9 layers of which 1 is dense, 8 experts of
which 4 are active, vocabulary 32,768; bfloat16 with bfloat16 moments. 5.7B parameters. Sequences have 4,096 tokens.

    deepseek-jax bench scaling

On Hopper GPUs add --config.kernels.grouped_matmul=mosaic_gpu --config.kernels.attention=cudnn.
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_slice


def get_config() -> ConfigDict:
    """v3_slice with 9 layers and 8 experts top-4; the batch follows from the number of devices."""
    config = v3_slice.get_config()
    config.name = "v3_scaling"

    m = config.model
    m.n_layers = 9
    m.n_experts = 8
    m.top_k = 4
    m.n_groups = 4
    m.top_groups = 2

    config.run.unroll = 1
    return config

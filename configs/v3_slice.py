"""V3 at its published widths, cut to what one 80 GB GPU trains: three layers, of which one is dense, and 16 experts.

For measuring a whole training step: hidden 7,168, 128 heads, latent attention and experts of V3's sizes; 4,096 tokens
in bfloat16 with bfloat16 moments. 2.9B parameters; with --config.model.n_experts=32, 4.3B.

    deepseek-jax bench train --config=v3_slice

On a Hopper GPU add --config.kernels.grouped_matmul=mosaic_gpu --config.kernels.attention=mosaic_gpu. In FP8 add
also --config.precision=fp8 --config.fp8.weights=bfloat16, and =mosaic_gpu for the other operations of config.kernels
that precision fp8 uses (`deepseek_jax.kernels.TABLE`). Compiling then takes a minute or two.
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_671b


def get_config() -> ConfigDict:
    """Vocabulary 32,768, width 7,168, 3 layers of which 1 dense, 16 experts top-8; 1 sequence of 4,096 tokens."""
    config = v3_671b.get_config()
    config.name = "v3_slice"

    m = config.model
    m.vocab_size = 32_768
    m.n_layers = 3
    m.n_dense_layers = 1
    m.n_experts = 16
    m.mtp_depth = 0

    batch = config.batch
    batch.size_start = batch.size = 1
    batch.ramp_steps = 0

    config.loss.chunk = 4096
    config.loss.mtp_weight_switch = 1_000_000_000  # there is no multi-token prediction
    config.schedule.warmup_steps = 1
    config.run.remat = "none"
    config.run.unroll = 2  # no loop over layers, and so no copies of its stacks
    return config

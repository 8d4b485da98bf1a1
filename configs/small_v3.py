"""A V3 of 128M parameters whose widths are multiples of 128, so that one Hopper GPU trains it with the FP8 kernels.

What the recipe of V3 section 3.3 costs in loss, as its appendix B.1 asks: the same weights and batches in bfloat16 and
in FP8, 2,000 steps of 24,576 bytes. Give it at least 50 MB of text, so that no text is read twice: what is learnt by
heart puts runs apart that differ in rounding alone. Minutes on one H200. BENCHMARKS.md has the curves.

    deepseek-jax train --config=small_v3 --workdir=runs/fp8 --config.data.source='TEXT/**/*.py'
    deepseek-jax train --config=small_v3 --workdir=runs/bf16 --config.data.source='TEXT/**/*.py' --config.precision=bf16
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import v3_671b


def get_config() -> ConfigDict:
    """Width 512, 9 layers of which 1 dense, 32 experts top-4, one depth of multi-token prediction."""
    config = v3_671b.get_config()
    config.name = "small_v3"
    config.precision = "fp8"
    config.kernels.attention = "cudnn"
    config.kernels.grouped_matmul = "mosaic_gpu"
    config.kernels.quantize = "mosaic_gpu"
    config.kernels.quantize_swiglu = "mosaic_gpu"
    config.kernels.quantize_squares = "mosaic_gpu"
    config.kernels.fp8_matmul = "mosaic_gpu"
    config.kernels.grouped_fp8_matmul = "mosaic_gpu"
    config.kernels.grouped_fp8_weight_gradient = "mosaic_gpu"

    m = config.model
    m.vocab_size = 272  # 256 bytes and the special tokens
    m.d_model = 512
    m.n_layers = 9
    m.n_dense_layers = 1
    m.dense_width = 1536
    m.n_heads = 4
    m.q_rank = 256
    m.kv_rank = 128
    m.n_experts = 32
    m.expert_width = 256
    m.top_k = 4
    m.n_groups = 4
    m.top_groups = 2
    m.init_std = 0.02

    config.data.source = "stdlib"
    config.data.tokenizer = "bytes"
    config.data.seq_len = 1024

    config.loop.steps = 2000
    config.loop.log_every = 5
    config.loop.eval_every = 500
    config.checkpoint.every = 2000
    config.batch.size_start = config.batch.size = 24
    config.batch.ramp_steps = 0
    config.loss.mtp_weight_switch = 1600
    config.loss.balance_rate_stop = 1900
    config.run.remat = "none"

    schedule = config.schedule
    schedule.peak_rate = 6e-4
    schedule.warmup_steps = 200
    schedule.constant_steps = 1000
    schedule.cosine_steps = 800
    schedule.tail_rate = schedule.final_rate = 6e-5
    schedule.tail_steps = 0
    return config

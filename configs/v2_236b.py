"""DeepSeek-V2, 236B parameters, of which 21B are active per token; V2.5 and Coder-V2 share these sizes.

Paper: arXiv 2405.04434, section 3.1.2: 8.1T tokens, batch 2,304 -> 9,216 over the first 225B tokens, learning rate
2.4e-4, times 0.316 at 60 % and again at 90 %; three balance losses.  172.8K H800 hours per trillion tokens.

    deepseek-jax plan --config=v2_236b --chip=h800 --devices=2048 --config.mesh.pipe=16 --config.mesh.expert=8
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "v2_236b"
    config.family = "v2"
    config.precision = "bf16"

    m = config.model
    m.vocab_size = 102_400
    m.d_model = 5120
    m.n_layers = 60
    m.n_dense_layers = 1
    m.dense_width = 12_288
    m.n_heads = 128
    m.q_rank = 1536
    m.kv_rank = 512
    m.nope_width = 128
    m.rope_width = 64
    m.value_width = 128
    m.rope_base = 10_000.0
    m.yarn = ConfigDict()  # none in pre-training; section 3.1.4 extends to 128K afterwards, with mscale 0.707
    m.n_experts = 160
    m.n_shared_experts = 2
    m.expert_width = 1536
    m.top_k = 6
    m.n_groups = 8
    m.top_groups = 3
    m.route_scale = 16.0
    m.norm_eps = 1e-6
    m.init_std = 0.006

    data = config.data
    data.tokenizer = "tokenizer.json"
    data.source = "corpus/*.array_record"
    data.seq_len = 4096
    data.fim_rate = 0.0

    config.run.remat = "block"
    config.loop.steps = 221_332  # 8.1T tokens

    batch = config.batch
    batch.size_start = 2304
    batch.size = 9216
    batch.ramp_steps = 12_716  # 225B tokens

    loss = config.loss
    loss.mtp_weight = loss.mtp_weight_final = 0.0
    loss.balance_rate = 0.0
    loss.auxiliary.expert_balance = 0.003
    loss.auxiliary.device_balance = 0.05
    loss.auxiliary.communication_balance = 0.02

    schedule = config.schedule
    schedule.peak_rate = 2.4e-4
    schedule.warmup_steps = 2000
    schedule.constant_steps = 133_502  # to 60 %
    schedule.cosine_steps = 0
    schedule.tail_rate = 7.584e-5
    schedule.tail_steps = 64_373  # to 90 %
    schedule.final_rate = 2.4e-5
    return config

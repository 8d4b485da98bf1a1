"""DeepSeek-V4-Flash, 284B parameters, of which 13B are active per token: the smaller V4, for a million tokens.

Paper: arXiv 2606.19348, section 4.2.1, and the released config.json. 32T tokens; 4K tokens long, then 16K, 64K and 1M,
in the stages `v4_dense`, `v4_16k`, `v4_warmup`, `v4_64k` and `v4_1m`. Here are the sizes, at a length of 4,096.

    deepseek-jax plan --config=v4_flash_284b
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base, v32_671b


def get_config() -> ConfigDict:
    """The published sizes and recipe, without the first trillion tokens, in which attention is dense."""
    config = base.get_config()
    config.name = "v4_flash_284b"
    config.family = "v4"
    config.precision = "bf16"

    m = config.model
    m.vocab_size = 129_280
    m.d_model = 4096
    m.n_layers = 43
    # of each layer, and at the end of the one of multi-token prediction
    m.compress_ratios = (0, 0, 4, *(128, 4) * 20, 0)
    m.index_ratio = 4
    m.n_hash_layers = 3
    m.n_heads = 64
    m.head_width = 512
    m.rope_width = 64
    m.q_rank = 1024
    m.out_groups = 8
    m.out_rank = 1024
    m.window = 128
    m.rope_base = 10_000.0
    m.compress_rope_base = 160_000.0
    m.yarn = ConfigDict({"factor": 16.0, "original_length": 65_536})
    v32_671b.indexer(config)
    m.index_heads = 64
    m.index_width = 128
    m.index_top_k = 512
    m.n_streams = 4
    m.sinkhorn_steps = 20
    m.hyper_eps = 1e-6
    m.n_experts = 256
    m.n_shared_experts = 1
    m.expert_width = 2048
    m.top_k = 6
    m.route_scale = 1.5
    m.swiglu_limit = 10.0
    m.mtp_depth = 1
    m.norm_eps = 1e-6
    m.init_std = 0.006

    data = config.data
    data.tokenizer = "tokenizer.json"
    data.source = "corpus/*.array_record"
    data.seq_len = 4096
    data.fim_rate = 0.1
    data.mask_documents = True

    optimizer = config.optimizer
    optimizer.method = "muon"
    optimizer.eps = 1e-20

    config.run.remat = "block"
    config.batch.size = 18_432  # sequences of 75.5M tokens
    config.loop.steps = 424_000  # 32T tokens
    config.loss.balance_rate = 1e-3

    schedule = config.schedule
    schedule.peak_rate = 2.7e-4
    schedule.warmup_steps = 2000
    schedule.constant_steps, schedule.cosine_steps = 372_000, 50_000  # their lengths are not published
    config.loss.mtp_weight_switch = 374_000  # where the rate begins to fall
    schedule.tail_rate = 2.7e-5
    schedule.final_rate = 2.7e-5
    return config

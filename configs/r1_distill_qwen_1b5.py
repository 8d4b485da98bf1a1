"""R1-Distill-Qwen 1.5B: a Qwen2.5-Math 1.5B, with biases in its attention.

Paper: DeepSeek-R1, arXiv 2501.12948, section 2.4: supervised on 800K samples of R1; learning rates in table 6 of the
version in Nature. Sizes from the released config.json.  1.78B parameters.

    deepseek-jax inspect --config=r1_distill_qwen_1b5
    deepseek-jax sft --config=r1_distill_qwen_1b5 --config.run.init_from=BASE --config.data.tokenizer=STUDENT
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import base


def get_config() -> ConfigDict:
    """The published sizes and recipe."""
    config = base.get_config()
    config.name = "r1_distill_qwen_1b5"
    config.family = "v1"
    config.model = model()
    return recipe(config, peak_rate=1e-4, last_rate=1e-5)


def model() -> ConfigDict:
    """Qwen2.5-Math 1.5B."""
    m = ConfigDict()
    m.vocab_size = 151_936
    m.d_model = 1536
    m.n_layers = 28
    m.dense_width = 8960
    m.n_heads = 12
    m.n_kv_heads = 2
    m.head_width = 128
    m.attention_bias = True
    m.qk_norm = False
    m.rope_base = 10_000.0
    m.rope_factor = 1.0
    m.rope_llama3 = ConfigDict()  # none
    m.yarn = ConfigDict()  # none
    m.norm_eps = 1e-6
    m.init_std = 0.02
    return m


def recipe(config: ConfigDict, peak_rate: float, last_rate: float) -> ConfigDict:
    """That of all students: 800K samples twice, the rate falling to a tenth along a cosine.

    The chat template has special tokens that the students' own tokenizers have and those of their bases have not:
    `data.tokenizer` names one of the former (STUDENT above; BASE is Qwen/Qwen2.5-Math-1.5B). Packed
    conversations need fewer steps: set loop.steps and schedule.cosine_steps.
    """
    config.precision = "bf16"
    config.data.tokenizer = "tokenizer.json"
    config.data.source = "conversations/*.jsonl"  # give yours
    config.data.format = "conversations"
    config.data.chat_template = "r1-distill"
    config.data.mask_documents = True
    config.data.seq_len = 32_768

    config.loop.steps = 25_000  # two epochs
    config.batch.size = 64
    config.loss.mtp_weight = config.loss.mtp_weight_final = 0.0
    config.loss.balance_rate = config.loss.auxiliary.expert_balance = 0.0
    config.run.remat = "block"

    schedule = config.schedule
    schedule.warmup_steps = 0
    schedule.constant_steps = 0
    schedule.cosine_steps = config.loop.steps
    schedule.tail_steps = 0
    schedule.peak_rate = peak_rate
    schedule.tail_rate = schedule.final_rate = last_rate
    return config

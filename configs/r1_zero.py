"""R1-Zero: V3's base model and GRPO, rewarded by rules for right answers and for the form of a thought and an answer.

Paper: arXiv 2501.12948, section 2.2 and its supplement: rate 3e-6, 32 questions x 16 answers of at most 32,768 tokens
per update, rollouts of 8,192 answers for 16 updates each, KL weight 0.001, the reference renewed every 400 updates,
10,400 updates, from update 8,200 on with answers of at most 65,536 tokens (rl.longest_answer, to set by hand). The clip
of R1-Zero is not given; 10 is that of R1's first stage. Ours reads problems with R1's chat template, in place of
R1-Zero's prompt. These are the paper's numbers; rl.rows_at_once says how many answers are drawn at a time.

    deepseek-jax rl --config=r1_zero --config.run.init_from=deepseek-ai/DeepSeek-V3-Base --config.rl.problems=FILES
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_sft, v3_671b


def get_config() -> ConfigDict:
    """Returns the published recipe; a step of ours, rollouts and their 16 updates, is 16 of the paper's."""
    config = recipe(v3_671b.get_config())
    config.name = "r1_zero"
    config.model.yarn = r1_sft.yarn()  # as the released V3-Base has it
    config.data.chat_template = "r1"

    rl = config.rl
    rl.problems = "problems.jsonl"  # give yours
    rl.questions, rl.answers, rl.updates = 512, 16, 16
    rl.longest_prompt = 1024  # not given
    rl.longest_answer = 32_768
    rl.temperature = 1.0
    rl.refresh_every = 25
    rl.rewards.accuracy = rl.rewards.format = 1.0
    rl.grpo.clip_low = rl.grpo.clip_high = 10.0
    rl.grpo.beta = 0.001

    config.loop.steps = 650
    config.schedule.peak_rate = config.schedule.tail_rate = config.schedule.final_rate = 3e-6
    return config


def recipe(config: ConfigDict) -> ConfigDict:
    """GRPO as DeepSeekMath and R1 have it: normalised advantages, a mean of means, k3; and a constant rate."""
    grpo = config.rl.grpo
    grpo.advantage = "std"
    grpo.aggregation = "sequence"
    grpo.unbiased_kl = False

    config.loop.log_every = 1
    config.loop.eval_every = 25
    config.checkpoint.every = 25
    config.loss.balance_rate = 0.0
    schedule = config.schedule
    schedule.warmup_steps, schedule.constant_steps, schedule.cosine_steps = 0, 1_000_000_000, 0
    config.optimizer.weight_decay = 0.0  # not given
    return config

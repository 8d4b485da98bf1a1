"""DeepSeekMath-RL 7B: GRPO on DeepSeekMath-Instruct.

Paper: arXiv 2402.03300, section 4.2: rate 1e-6, KL weight 0.04, 64 answers of at most 1,024 tokens per question,
batches of 1,024 answers, one update for each, 144K questions of GSM8K and MATH. The paper scores by a reward model;
here rules do (problems of kind "math"). rl.rows_at_once says how many answers are drawn at a time.

    deepseek-jax rl --config=math_7b_rl --config.run.init_from=deepseek-ai/deepseek-math-7b-instruct
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import math_7b, r1_zero


def get_config() -> ConfigDict:
    """Returns the published recipe."""
    config = r1_zero.recipe(math_7b.get_config())
    config.name = "math_7b_rl"
    config.data.chat_template = "v1"

    rl = config.rl
    rl.problems = "problems.jsonl"  # give yours
    rl.questions, rl.answers, rl.updates = 16, 64, 1
    rl.longest_prompt = 1024  # not given
    rl.longest_answer = 1024
    rl.grpo.clip_low = rl.grpo.clip_high = 0.2  # not given
    rl.grpo.beta = 0.04

    config.loop.steps = 9_000  # 144K questions once
    config.schedule.peak_rate = config.schedule.tail_rate = config.schedule.final_rate = 1e-6
    return config

"""GRPO as DeepSeek-V3.2 has it, on the network of V3.

Paper: arXiv 2512.02556, section 3.1: advantages r - mean r; a mean over each answer's tokens (eq. 5); the KL estimate
with an unbiased gradient (eq. 7); answers that are worse than the mean and have become too unlikely are masked (eqs. 8,
9); Keep Routing; Keep Sampling Mask, with draws by top-p. The paper gives no sizes, rates or bounds: those of R1 stand
here, the clip of PPO, and top-p and temperature as the model card recommends them. Its KL weight depends on the domain,
and may be 0 for mathematics. V3.2's own network, with sparse attention, is another one.

    deepseek-jax rl --config=v32_rl --config.run.init_from=RUN --config.rl.problems=FILES
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_zero


def get_config() -> ConfigDict:
    """Returns the published objective with R1's sizes."""
    config = r1_zero.get_config()
    config.name = "v32_rl"

    rl = config.rl
    rl.top_p = 0.95  # model card
    rl.keep_routing = True
    rl.rewards.format = 0.0
    rl.rewards.language = rl.rewards.length = 1.0  # their weights are not given

    grpo = rl.grpo
    grpo.advantage = "mean"
    grpo.clip_low = grpo.clip_high = 0.2  # not given
    grpo.unbiased_kl = True
    grpo.off_policy_bound = 0.5  # not given
    return config

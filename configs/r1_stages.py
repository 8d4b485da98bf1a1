r"""R1 with weights that are given: all its stages, each with the published recipe, for `deepseek-jax r1`.

Paper: arXiv 2501.12948, section 2.3 and its supplement: `r1_sft` for the stages of fine-tuning, `r1_stage1` and
`r1_stage2` for those of reinforcement learning. Numbers of steps are the paper's, for its amounts of data: set
config.r1.STAGE.loop.steps, and schedule.cosine_steps of what is fine-tuned, for yours; and config.rl.longest_answer,
config.data.seq_len, config.rl.questions for smaller machines. Balance losses and multi-token prediction rest, so that
weights of any family will do; distillation into a small model may want a higher rate.

    deepseek-jax r1 --config=r1_stages --config.rl.problems=FILES --config.r1.cold.data.source=FILES \
        --config.r1.base.run.init_from=DIR --config.r1.student_base.run.init_from=SMALL
"""

from ml_collections import ConfigDict

from deepseek_jax.configs import r1_sft, r1_stage1, r1_stage2
from deepseek_jax.configs.tiny_r1 import recipe


def get_config() -> ConfigDict:
    """Returns the config that all stages share, and what each changes of it; the weights of both bases are to name."""
    config = r1_stage1.get_config()
    config.name = "r1_stages"
    config.data.seq_len = 32_768
    config.data.mask_documents = True
    config.data.fim_rate = 0.0

    r1 = config.r1
    r1.base, r1.student_base = given(), given()
    r1.cold, r1.sft, r1.student = fine_tuning(), fine_tuning(), fine_tuning()
    r1.cold.data = ConfigDict({"source": "conversations.jsonl"})  # give yours
    r1.kept = ConfigDict()
    r1.first, r1.second, r1.student_zero = (recipe(one.get_config()) for one in (r1_stage1, r1_stage2, r1_stage1))
    r1.second.rl = ConfigDict({"temperature": r1_stage2.get_config().rl.temperature})
    return config


def given() -> ConfigDict:
    """Returns the changes of a base: its weights are a run's or published ones."""
    return ConfigDict({"run": {"init_from": ""}})


def fine_tuning() -> ConfigDict:
    """Returns how a stage is fine-tuned."""
    changes = recipe(r1_sft.get_config())
    changes.loss.mtp_weight = changes.loss.mtp_weight_final = 0.0
    changes.loss.auxiliary.expert_balance = 0.0
    return changes

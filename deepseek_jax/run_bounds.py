"""The bounds of every key of a run: what `configs/base.py` gives a default, this gives its limits.

The keys of `config.model` are bounded by its family (`models/checks.py`), and what hangs together (a batch and the
devices, a tokenizer and the vocabulary) is checked where it meets.
"""

import difflib
import functools
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax import bounds
from deepseek_jax.bounds import LARGEST, MOST_POSITIONS, SEED, STEPS, Bound
from deepseek_jax.configs import base
from deepseek_jax.errors import UserError
from deepseek_jax.kernels import TABLE
from deepseek_jax.parallel.alltoall import KINDS
from deepseek_jax.parallel.schedule import SCHEDULES
from deepseek_jax.rl.grpo import ADVANTAGES, AGGREGATIONS, RATIOS
from deepseek_jax.rl.rejection import CHOICES, LEAST
from deepseek_jax.rl.rewards import NAMES as REWARDS
from deepseek_jax.saved_config import RENAMED, leaves

DEVICES = 1_000_000_000
TOKEN = bounds.whole(0, LARGEST)  # an id
ANY_STEPS, SOME_STEPS = bounds.whole(0, STEPS), bounds.whole(1, STEPS)
RATE = bounds.number(0, 1000, above=True)  # of learning
LOSS = bounds.number(0, 1000)  # weight of a part of the loss, or of a reward
MESH_AXIS = bounds.one_of("", "data", "context", "expert")
AUXILIARY = "loss.auxiliary."  # a config adds the weight of any auxiliary loss that its layers report
STAGES = "r1."  # changes of stages, which are checked as keys of the configs that they make
WHOLE_RUN = "Start from a config that holds a whole run, like tiny_v3."

BOUNDS: dict[str, Bound] = {
    "name": bounds.name(),
    "family": bounds.one_of("v1", "moe", "v2", "v3", "v32", "v4"),
    "seed": SEED,
    "precision": bounds.one_of("fp32", "bf16", "fp8", "fp4"),
    "release.folder": bounds.path(),
    "release.n_positions": bounds.whole(0, MOST_POSITIONS),
    "release.bos_id": bounds.optional(TOKEN),
    "release.pad_id": bounds.optional(TOKEN),
    "release.eos_ids": bounds.several(TOKEN),
    "release.end_ids": bounds.several(TOKEN),
    "mesh.pipe": bounds.whole(1, DEVICES),
    "mesh.data": bounds.besides(bounds.whole(1, DEVICES), -1),
    "mesh.expert": bounds.whole(1, DEVICES),
    "mesh.context": bounds.whole(1, DEVICES),
    "pipeline.micro_batches": bounds.whole(1, LARGEST),
    "pipeline.schedule": bounds.one_of(*SCHEDULES),
    "pipeline.put_off": bounds.whole(-1, LARGEST),
    "exchange.kind": bounds.one_of(*KINDS),
    "exchange.groups": bounds.whole(1, DEVICES),
    "sharding.experts": MESH_AXIS,
    "sharding.embed": MESH_AXIS,
    "sharding.vocab": MESH_AXIS,
    "sharding.heads": MESH_AXIS,
    "sharding.mlp": MESH_AXIS,
    "sharding.q_latent": MESH_AXIS,
    "sharding.kv_latent": MESH_AXIS,
    "data.source": bounds.path(1),
    "data.text_key": bounds.text(1),
    "data.format": bounds.one_of("auto", "text", "conversations"),
    "data.chat_template": bounds.text(),
    "data.train_on": bounds.one_of("answers", "last"),
    "data.special_tokens": bounds.switch(),
    "data.add_bos": bounds.switch(),
    "data.tokenizer": bounds.path(1),
    "data.seq_len": bounds.whole(1, LARGEST),
    "data.fim_rate": bounds.number(0, 1),
    "data.mask_documents": bounds.switch(),
    "data.holdout_rate": bounds.number(0, 1, below=True),
    "data.workers": bounds.whole(0, 1024),
    "data.cache_dir": bounds.path(),
    "loop.steps": SOME_STEPS,
    "loop.log_every": SOME_STEPS,
    "loop.eval_every": ANY_STEPS,
    "loop.eval_batches": SOME_STEPS,
    "loop.eval_redundant": bounds.whole(0, 100_000),
    "loop.max_skipped": SOME_STEPS,
    "loop.routing_delay": bounds.whole(0, 1000),
    "batch.size": bounds.whole(1, LARGEST),
    "batch.size_start": bounds.whole(0, LARGEST),
    "batch.ramp_steps": ANY_STEPS,
    "loss.chunk": bounds.whole(1, STEPS),
    "loss.mtp_weight": LOSS,
    "loss.mtp_weight_final": LOSS,
    "loss.mtp_weight_switch": ANY_STEPS,
    "loss.balance_rate": bounds.number(0, 1),
    "loss.balance_rate_stop": ANY_STEPS,
    "loss.trained": bounds.text(),
    "loss.clip_norm": bounds.number(0, 1e9, above=True),
    "loss.auxiliary.expert_balance": LOSS,
    "loss.auxiliary.device_balance": LOSS,
    "loss.auxiliary.communication_balance": LOSS,
    "run.init_from": bounds.path(),
    "run.anew": bounds.text(),
    "run.remat": bounds.one_of("none", "dots", "block"),
    "run.unroll": bounds.whole(1, 1024),
    "run.compilation_cache": bounds.path(),
    "lora.rank": bounds.whole(0, LARGEST),
    "lora.alpha": bounds.number(0, 1e6, above=True),
    "lora.targets": bounds.text(1),
    "lora.init_from": bounds.path(),
    **{f"kernels.{operation}": bounds.one_of(*known) for operation, known in TABLE.items()},
    "fp8.weights": bounds.one_of("float32", "bfloat16"),
    "fp8.scale": bounds.one_of("fp32", "ue8m0"),
    "fp8.gradient_block": bounds.one_of("1x128", "128x128"),
    "schedule.peak_rate": RATE,
    "schedule.warmup_steps": ANY_STEPS,
    "schedule.constant_steps": ANY_STEPS,
    "schedule.cosine_steps": ANY_STEPS,
    "schedule.tail_rate": RATE,
    "schedule.tail_steps": ANY_STEPS,
    "schedule.final_rate": RATE,
    "optimizer.method": bounds.one_of("adamw", "muon"),
    "optimizer.momentum": bounds.number(0, 1, below=True),
    "optimizer.rms": bounds.number(0, 1000, above=True),
    "optimizer.beta1": bounds.number(0, 1, below=True),
    "optimizer.beta2": bounds.number(0, 1, below=True),
    "optimizer.eps": bounds.number(1e-30, 1),
    "optimizer.weight_decay": bounds.number(0, 1000),
    "optimizer.moments_dtype": bounds.one_of("float32", "bfloat16"),
    "rl.problems": bounds.path(1),
    "rl.holdout_rate": bounds.number(0, 1, above=True, below=True),
    "rl.teacher": bounds.path(),
    "rl.thinking": bounds.switch(),
    "rl.questions": SOME_STEPS,
    "rl.answers": bounds.whole(2, LARGEST),
    "rl.updates": SOME_STEPS,
    "rl.longest_prompt": SOME_STEPS,
    "rl.longest_answer": SOME_STEPS,
    "rl.temperature": bounds.number(0, 1000, above=True),
    "rl.top_p": bounds.number(0, 1, above=True),
    "rl.keep_routing": bounds.switch(),
    "rl.rollout": bounds.one_of("batch", "engine"),
    "rl.rows_at_once": ANY_STEPS,
    "rl.refresh_every": ANY_STEPS,
    "rl.eval_problems": SOME_STEPS,
    "rl.verifiers": bounds.whole(1, 1024),
    "rl.verify_s": bounds.number(0, 1e6, above=True),
    **{f"rl.rewards.{name}": LOSS for name in REWARDS},
    "rl.grpo.advantage": bounds.one_of(*ADVANTAGES),
    "rl.grpo.aggregation": bounds.one_of(*AGGREGATIONS),
    "rl.grpo.ratio": bounds.one_of(*RATIOS),
    "rl.grpo.clip_low": bounds.number(0, 1000),
    "rl.grpo.clip_high": bounds.number(0, 1000),
    "rl.grpo.log_ratio_bound": bounds.number(0, 80, above=True),
    "rl.grpo.beta": bounds.number(0, 1000),
    "rl.grpo.unbiased_kl": bounds.switch(),
    "rl.grpo.off_policy_bound": bounds.number(0, 1000),
    "rl.grpo.importance_cap": bounds.number(0, 1000),
    "sample.problems": SOME_STEPS,
    "sample.answers": SOME_STEPS,
    "sample.most": SOME_STEPS,
    "sample.choose": bounds.one_of(*CHOICES),
    "sample.longest": ANY_STEPS,
    **{f"sample.least.{name}": bounds.number(0, 1) for name in LEAST},
    "ema.decay": bounds.number(0, 1, below=True),
    "ema.evaluate": bounds.switch(),
    "checkpoint.every": SOME_STEPS,
    "checkpoint.keep": SOME_STEPS,
    "checkpoint.local": bounds.path(),
    "watch.heartbeat_s": bounds.number(2, 86_400),
    "watch.alone": bounds.switch(),
    "watch.step_s": bounds.number(0, 1e6),
    "watch.long_s": bounds.number(0, 1e6),
    "watch.stop_s": bounds.number(0, 1e6),
    "watch.slow": bounds.besides(bounds.number(1, 1e6, above=True), 0),
    "wandb.project": bounds.text(),
    "profile.port": bounds.whole(0, 65_535),
    "profile.first": SOME_STEPS,
    "profile.steps": ANY_STEPS,
    "profile.process": bounds.whole(-1, DEVICES),
}


def check_keys(config: ConfigDict) -> None:
    """Raises UserError unless every key of a run is there with a value within its bounds, and no other key is."""
    if not isinstance(config.get("model"), ConfigDict) or not len(config.model):
        raise UserError(f"config {config.get('name', '')} has no config.model. {WHOLE_RUN}")
    known = {key: value for key, value in leaves(config).items() if not key.startswith(("model.", STAGES))}
    limits = BOUNDS | {key: LOSS for key in known if key.startswith(AUXILIARY)}
    for key in known:
        if key not in limits:
            near = [RENAMED[key]] if key in RENAMED else difflib.get_close_matches(key, BOUNDS, n=1, cutoff=0.5)
            hint = f"Did you mean config.{near[0]}?" if near else "configs/base.py has all that there are."
            raise UserError(f"config.{key}: no such key. {hint}")
    if missing := [key for key in BOUNDS if key not in known]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"config.{missing[0]}{more}: missing. {WHOLE_RUN}")
    defaults = default_values()
    for key, bound in limits.items():
        bound.check(f"config.{key}", known[key], like=defaults.get(key, 0.0))


def check_model(config: ConfigDict) -> None:
    """Raises UserError unless `config.model` makes a model of its family, and has no keys besides."""
    from deepseek_jax.models import family  # which imports jax: keys are checked without

    module = family(config.family)
    for key in config.model:
        if key not in module.KEYS:
            near = difflib.get_close_matches(str(key), module.KEYS, n=1, cutoff=0.5)
            hint = f"Did you mean config.model.{near[0]}?" if near else f"Its keys: {', '.join(module.KEYS)}."
            raise UserError(f"config.model.{key}: family {config.family} has no such key. {hint}")
    module.Config.from_config(config.model)


@functools.cache
def default_values() -> dict[str, Any]:
    """Returns dotted key -> value of `configs/base.py`."""
    return leaves(base.get_config())

"""The bounds of every key of a run: what `configs/base.py` gives a default, this gives its limits.

The keys of ``config.model`` are bounded by its family (`models/checks.py`), and what hangs together (a batch and the
devices, a tokenizer and the vocabulary) is checked where it meets.
"""

import difflib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.bounds import (
    LARGEST,
    MOST_POSITIONS,
    SEED,
    STEPS,
    Bound,
    besides,
    name,
    number,
    one_of,
    optional,
    path,
    several,
    switch,
    text,
    whole,
)
from deepseek_jax.configs import base
from deepseek_jax.errors import UserError

DEVICES = 1_000_000_000
TOKEN = whole(0, LARGEST)  # an id
ANY_STEPS, SOME_STEPS = whole(0, STEPS), whole(1, STEPS)
RATE = number(0, 1000, above=True)  # of learning
LOSS = number(0, 1000)  # weight of a part of the loss
MESH_AXIS = one_of("", "data", "expert")
WHOLE_RUN = "Start from a config that holds a whole run, like tiny_v3."

BOUNDS: dict[str, Bound] = {
    "name": name(),
    "family": one_of("v1", "moe", "v2", "v3"),
    "seed": SEED,
    "precision": one_of("fp32", "bf16"),
    "release.folder": path(),
    "release.n_positions": whole(0, MOST_POSITIONS),
    "release.bos_id": optional(TOKEN),
    "release.pad_id": optional(TOKEN),
    "release.eos_ids": several(TOKEN),
    "release.end_ids": several(TOKEN),
    "mesh.pipe": whole(1, DEVICES),
    "mesh.data": besides(whole(1, DEVICES), -1),
    "mesh.expert": whole(1, DEVICES),
    "sharding.experts": MESH_AXIS,
    "sharding.embed": MESH_AXIS,
    "sharding.vocab": MESH_AXIS,
    "sharding.heads": MESH_AXIS,
    "sharding.mlp": MESH_AXIS,
    "sharding.q_latent": MESH_AXIS,
    "sharding.kv_latent": MESH_AXIS,
    "data.source": path(1),
    "data.text_key": text(1),
    "data.format": one_of("auto", "text", "conversations"),
    "data.chat_template": text(),
    "data.train_on": one_of("answers", "last"),
    "data.special_tokens": switch(),
    "data.add_bos": switch(),
    "data.tokenizer": path(1),
    "data.seq_len": whole(1, LARGEST),
    "data.fim_rate": number(0, 1),
    "data.mask_documents": switch(),
    "data.holdout_rate": number(0, 1, below=True),
    "data.workers": whole(0, 1024),
    "data.cache_dir": path(),
    "train.init_from": path(),
    "train.steps": SOME_STEPS,
    "train.batch_size": whole(1, LARGEST),
    "train.batch_size_start": whole(1, LARGEST),
    "train.batch_ramp_steps": ANY_STEPS,
    "train.micro_batches": whole(1, LARGEST),
    "train.remat": one_of("none", "dots", "block"),
    "train.unroll": whole(1, 1024),
    "train.loss_chunk": whole(1, STEPS),
    "train.mtp_weight": LOSS,
    "train.mtp_weight_final": LOSS,
    "train.mtp_weight_switch": ANY_STEPS,
    "train.balance_rate": number(0, 1),
    "train.balance_rate_stop": ANY_STEPS,
    "train.auxiliary.expert_balance": LOSS,
    "train.auxiliary.device_balance": LOSS,
    "train.auxiliary.communication_balance": LOSS,
    "train.max_skipped": SOME_STEPS,
    "train.eval_every": ANY_STEPS,
    "train.eval_batches": SOME_STEPS,
    "train.log_every": SOME_STEPS,
    "train.compilation_cache": path(),
    "optimizer.peak_rate": RATE,
    "optimizer.warmup_steps": ANY_STEPS,
    "optimizer.constant_steps": ANY_STEPS,
    "optimizer.cosine_steps": ANY_STEPS,
    "optimizer.tail_rate": RATE,
    "optimizer.tail_steps": ANY_STEPS,
    "optimizer.final_rate": RATE,
    "optimizer.beta1": number(0, 1, below=True),
    "optimizer.beta2": number(0, 1, below=True),
    "optimizer.eps": number(1e-30, 1),
    "optimizer.weight_decay": number(0, 1000),
    "optimizer.clip_norm": number(0, 1e9, above=True),
    "optimizer.moments_dtype": one_of("float32", "bfloat16"),
    "checkpoint.every": SOME_STEPS,
    "checkpoint.keep": SOME_STEPS,
}

AUXILIARY = "train.auxiliary."  # weights of the losses that layers report: a config may have more than the defaults


def check_keys(config: ConfigDict) -> None:
    """Raises UserError unless every key of a run is there with a value within its bounds, and no other key is."""
    if not isinstance(config.get("model"), ConfigDict) or not len(config.model):
        raise UserError(f"config {config.get('name', '')} has no config.model. {WHOLE_RUN}")
    given = keys(config)
    known = {key: value for key, value in given.items() if not key.startswith("model.")}
    bounds = BOUNDS | {key: LOSS for key in known if key.startswith(AUXILIARY)}
    for key in known:
        if key not in bounds:
            near = difflib.get_close_matches(key, BOUNDS, n=1, cutoff=0.5)
            hint = f"Did you mean config.{near[0]}?" if near else "configs/base.py has all that there are."
            raise UserError(f"config.{key}: no such key. {hint}")
    if missing := [key for key in BOUNDS if key not in known]:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise UserError(f"config.{missing[0]}{more}: missing. {WHOLE_RUN}")
    defaults = default_values()
    for key, bound in bounds.items():
        bound.check(f"config.{key}", known[key], like=defaults.get(key, 0.0))


def check_model(config: ConfigDict) -> None:
    """Raises UserError unless `config.model` makes a model of its family, and has no keys besides."""
    from deepseek_jax.models import family  # which imports jax: keys are checked without
    from deepseek_jax.models.checks import keys_of

    module = family(config.family)
    known = keys_of(module)
    for key in config.model:
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1, cutoff=0.5)
            hint = f"Did you mean config.model.{near[0]}?" if near else f"Its keys: {', '.join(known)}."
            raise UserError(f"config.model.{key}: family {config.family} has no such key. {hint}")
    module.Config.from_config(config.model)


def keys(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns dotted key -> value of a config; the groups themselves are not among them, empty ones neither."""
    found = {}
    for key, value in config.items():
        inner = keys(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
        found |= inner
    return found


def default_values() -> dict[str, Any]:
    """Returns dotted key -> value of `configs/base.py`."""
    return keys(base.get_config())

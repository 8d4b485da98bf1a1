"""The resolved config as JSON and back, exactly: what is kept beside the checkpoints of a run.

| format | keys |
| --- | --- |
| 1 | `train.…` and the learning rates under `optimizer.…`; the format itself is not stated |
| 2 | `loop`, `batch`, `loss`, `run` and `schedule`, each the arguments of a dataclass |
| 3 | `run.micro_batches` is `pipeline.micro_batches` |

Formats 1 and 2 are read as well: their keys are moved, and what they do not have yet gets its default.
"""

from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax.configs import base
from deepseek_jax.errors import UserError

FORMAT = 3
MOVED = {  # keys of `train` in format 1: the group in which they are now
    "loop": ("steps", "log_every", "eval_every", "eval_batches", "max_skipped"),
    "loss": ("mtp_weight", "mtp_weight_final", "mtp_weight_switch", "balance_rate", "balance_rate_stop"),
    "run": ("init_from", "remat", "unroll", "compilation_cache"),
    "pipeline": ("micro_batches",),
}
RATES = ("peak_rate", "warmup_steps", "constant_steps", "cosine_steps", "tail_rate", "tail_steps", "final_rate")
RENAMED = {f"train.{key}": f"{group}.{key}" for group, keys in MOVED.items() for key in keys}
RENAMED |= {f"optimizer.{key}": f"schedule.{key}" for key in RATES}
RENAMED |= {
    "run.micro_batches": "pipeline.micro_batches",
    "train.batch_size": "batch.size",
    "train.batch_size_start": "batch.size_start",
    "train.batch_ramp_steps": "batch.ramp_steps",
    "train.loss_chunk": "loss.chunk",
    "train.balance_loss": "loss.auxiliary.expert_balance",
    "train.device_balance_loss": "loss.auxiliary.device_balance",
    "train.communication_balance_loss": "loss.auxiliary.communication_balance",
    "optimizer.clip_norm": "loss.clip_norm",
}
ADDED = {"v1": {"qk_norm": False, "yarn": {}}}  # keys of a family's model that its first runs do not have


def to_json(config: ConfigDict) -> dict:
    """Returns a tree of what JSON knows; tuples are marked, so that `from_json` gives back the same config."""
    return {"format": FORMAT, **_encode(config)}


def from_json(tree: dict) -> ConfigDict:
    """Inverse of `to_json`, also after `json.dumps` and `json.loads`; the keys come locked.

    Raises UserError for a format that this version does not know.
    """
    found = tree.get("format", 1)
    if found not in range(1, FORMAT + 1):
        raise UserError(
            f"a saved config has format {found!r}, this version of deepseek_jax reads 1 to {FORMAT}. "
            "Install the version that wrote it, or a later one."
        )
    config = _decode({key: value for key, value in tree.items() if key != "format"})
    return (converted(config) if found < FORMAT else config).lock()


def converted(config: ConfigDict) -> ConfigDict:
    """Returns the config that one of an earlier format is in this one."""
    new = ConfigDict({"model": {**ADDED.get(config.get("family", ""), {}), **config.get("model", {})}})
    for key, value in leaves(config).items():
        if not key.startswith("model."):
            _set(new, RENAMED.get(key, key), value)
    return completed(new)


def completed(config: ConfigDict) -> ConfigDict:
    """Returns the config of a run with the defaults of keys that it does not have, for they are newer than the run."""
    new = base.get_config()
    new.model = config.get("model", ConfigDict())
    for key, value in leaves(config).items():
        if not key.startswith("model."):
            _set(new, key, value)
    return new.lock()


def leaves(config: Mapping, prefix: str = "") -> dict[str, Any]:
    """Returns dotted key -> value of a config; the groups themselves are not among them, empty ones neither."""
    found: dict[str, Any] = {}
    for key, value in config.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, ConfigDict) else {f"{prefix}{key}": value}
    return found


def _set(config: ConfigDict, path: str, value: Any) -> None:
    """Sets a dotted key, which need not be there yet."""
    *groups, last = path.split(".")
    for name in groups:
        if name not in config:
            config[name] = ConfigDict()
        config = config[name]
    with config.ignore_type():
        config[last] = value


def _encode(value: Any) -> Any:
    if isinstance(value, (ConfigDict, dict)):
        return {key: _encode(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return {"__tuple__": [_encode(item) for item in value]}
    if isinstance(value, list):
        return [_encode(item) for item in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a config holds numbers, text, None, tuples and lists; this one holds {type(value).__name__}")


def _decode(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {"__tuple__"}:
        return tuple(_decode(item) for item in value["__tuple__"])
    if isinstance(value, dict):
        return ConfigDict({key: _decode(item) for key, item in value.items()})
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value

"""The resolved config as JSON and back, exactly: what is kept beside the checkpoints of a run."""

from typing import Any

from ml_collections import ConfigDict


def to_json(config: ConfigDict) -> dict:
    """Returns a tree of what JSON knows; tuples are marked, so that ``from_json`` gives back the same config."""
    return _encode(config)


def from_json(tree: dict) -> ConfigDict:
    """Inverse of ``to_json``, also after ``json.dumps`` and ``json.loads``; the keys come locked."""
    return _decode(tree).lock()


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

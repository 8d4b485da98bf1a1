"""Checked values of config.json: every problem is a UserError that names the key, its value and what was expected."""

import math
from collections.abc import Mapping
from typing import Any

from deepseek_jax.bounds import LARGEST
from deepseek_jax.convert.safetensors.format import shown
from deepseek_jax.errors import UserError


def is_integer(value: object, least: int, most: int) -> bool:
    """Returns whether a value is an integer from `least` to `most`; True and False are not."""
    return type(value) is int and least <= value <= most


def integer(
    hf: Mapping, key: str, default: int | None = None, least: int = 1, most: int = LARGEST, where: str = ""
) -> int:
    """Returns an integer from `least` to `most`; a missing or null key gives the default, if there is one."""
    value: Any = hf.get(key)
    if value is None and default is not None:
        return default
    if not is_integer(value, least, most):
        raise invalid(hf, key, f"an integer from {least:,} to {most:,}", where)
    return value


def number(hf: Mapping, key: str, default: float | None = None, least: float | None = None, where: str = "") -> float:
    """Returns a finite number, above 0 or, with `least`, at least that; a missing or null key gives the default."""
    value: Any = hf.get(key)
    if value is None and default is not None:
        return default
    valid = type(value) in (int, float) and abs(value) <= 1e15 and math.isfinite(value)
    if not valid or (value <= 0 if least is None else value < least):
        raise invalid(hf, key, "a number above 0" if least is None else f"a number >= {least:g}", where)
    return float(value)


def boolean(hf: Mapping, key: str, default: bool, where: str = "") -> bool:
    """Returns true or false; a missing key gives the default."""
    value = hf.get(key, default)
    if not isinstance(value, bool):
        raise invalid(hf, key, "true or false", where)
    return value


def invalid(hf: Mapping, key: str, expected: str, where: str = "") -> UserError:
    """Returns the error for a missing key or a wrong value; `where` is the object, such as "rope_scaling."."""
    given = f"{where}{key}={shown(hf[key])}" if key in hf else f"{where}{key} is missing"
    return UserError(f"config.json: {given}: expected {expected}.")

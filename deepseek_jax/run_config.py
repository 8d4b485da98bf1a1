"""Configs of runs: found by name or in a file, changed key by key, checked.

    config = load("tiny_v3")                        # or a .py file with get_config()
    override(config, {"schedule.peak_rate": "1e-3"})
    validate(config)

Overrides are typed by the config itself (ml_collections `config_flags`, with flags of our own rather than the
process's). Whatever is wrong comes out as a `UserError`.
"""

import ast
import contextlib
import difflib
import importlib
import importlib.util
import os
import pkgutil
import re
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from deepseek_jax import configs
from deepseek_jax.bounds import article, in_line
from deepseek_jax.errors import UserError
from deepseek_jax.paths import check_local
from deepseek_jax.run_bounds import check_keys, check_model
from deepseek_jax.saved_config import RENAMED

UNREADABLE = (flags.Error, ValueError, TypeError, SyntaxError, MemoryError, RecursionError)  # what text may raise


def names() -> list[str]:
    """Returns the configs of `deepseek_jax.configs`, without importing them."""
    return sorted({module.name for module in pkgutil.iter_modules(configs.__path__)} - {"base"})


def load(name: str, flag: str = "config") -> ConfigDict:
    """Returns the config of a name in `deepseek_jax.configs` or of a `.py` file, its keys locked.

    `config.name` is filled in. Messages call the name the value of `flag`.
    """
    check_local(name, flag)
    is_path = name.endswith(".py") or "/" in name or "\\" in name
    if is_path and not Path(name).is_file():
        raise UserError(f"{flag}={name}: no such file. Give a path that exists or one of: {', '.join(names())}.")
    if not is_path and name not in (*names(), "base"):
        near = difflib.get_close_matches(name, names(), n=1)
        hint = f"Did you mean {near[0]}? " if near else ""
        raise UserError(f"{flag}={name}: no such config. {hint}Configs: {', '.join(names())}.")
    config = _executed(name, flag, is_path)
    if "name" in config and (is_path or not config.name):  # a file's parent has named itself already
        config.name = Path(name).stem if is_path else name
    return config.lock()


def override(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Sets `a.b` to a value written as text, typed by the present value; returns the same config."""
    for path, text in overrides.items():
        old = lookup(config, path)
        if isinstance(old, ConfigDict):
            keys = ", ".join(f"config.{path}.{key}" for key in list(old)[:3])
            raise UserError(f"config.{path} is a group of keys and takes no value. Set one of its keys: {keys}, ...")
        if old is None:  # nothing to be typed by: read as a Python literal, else as text
            _set_untyped(config, path, text)
            continue
        argument = f"--config.{path}={text}"
        values = flags.FlagValues()
        try:
            config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=["", argument])
            values(["", argument])
        except UNREADABLE as error:
            expected = article(type(old).__name__)
            raise UserError(f"config.{path}={in_line(text)}: expected {expected}, like {old!r}.") from error
    return config


def validate(config: ConfigDict) -> ConfigDict:
    """Returns the config of a run; raises UserError unless every key is there, known and within its bounds."""
    check_keys(config)
    check_model(config)
    return config


def lookup(config: ConfigDict, path: str) -> Any:
    """Returns the value of `a.b`; a misspelt key raises UserError with the nearest one."""
    node, parts = config, path.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            near = [RENAMED[path]] if path in RENAMED else difflib.get_close_matches(path, _paths(config), 1, 0.5)
            siblings = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "none, it is a value"
            where = ".".join(["config", *parts[:depth]])
            hint = f"Did you mean config.{near[0]}?" if near else f"Keys of {where}: {siblings}."
            raise UserError(f"config.{path}: no such key. {hint}")
        node = node[part]
    return node


def assignments(config: ConfigDict, prefix: str = "config") -> list[str]:
    """Returns every key as the line of a config file that sets it: "config.data.seq_len = 256"."""
    lines = []
    for key, value in config.items():
        name = f"{prefix}.{key}"
        if not isinstance(value, ConfigDict):
            lines.append(f"{name} = {value!r}")
        else:
            lines += assignments(value, name) if len(value) else [f"{name} = ConfigDict()"]
    return lines


def _executed(name: str, flag: str, is_path: bool) -> ConfigDict:
    """What get_config() of a file returns. Raises UserError for whatever a file that the user wrote may raise."""
    try:
        with contextlib.redirect_stdout(sys.stderr):  # keeps what the file prints out of our output
            module = _execute(Path(name)) if is_path else importlib.import_module(f"deepseek_jax.configs.{name}")
            config = module.get_config() if callable(getattr(module, "get_config", None)) else module
        list(_paths(config) if isinstance(config, ConfigDict) else ())
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise UserError(
            f"{flag}={name}: the file raised {in_line(what)}{_place(error, name)}. {_advice(error)}"
        ) from error
    if config is module:
        raise UserError(f"{flag}={name}: the file has no function get_config(). Write one that returns a ConfigDict.")
    if not isinstance(config, ConfigDict):
        raise UserError(f"{flag}={name}: get_config() gave a {type(config).__name__}; it must return a ConfigDict.")
    return config


def _execute(path: Path) -> Any:
    """Imports a config from a file anywhere, so that its own errors point into it."""
    spec = importlib.util.spec_from_file_location(f"config_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"--config={path}: not a Python file. Name a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _place(error: BaseException, file: str) -> str:
    """Returns " (line N of FILE)" for the innermost frame in the file, or the innermost of all; "" without one."""
    places = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    own = [place for place in places if os.path.realpath(place[0]) == os.path.realpath(file)]
    found = (own or places)[-1:]
    return f" (line {found[0][1]} of {found[0][0]})" if found else ""


def _advice(error: BaseException) -> str:
    """Returns what to do about an error of a config file, which may use a group of keys that has been divided."""
    group = str(error).strip("\"'") if isinstance(error, AttributeError) else ""
    if places := sorted({new.partition(".")[0] for old, new in RENAMED.items() if old.startswith(f"{group}.")}):
        return f"The keys of config.{group} are now in {', '.join(f'config.{place}' for place in places)}: rename them."
    return "Fix it."


def _paths(config: ConfigDict, prefix: str = "") -> list[str]:
    """Returns every dotted key, groups included."""
    found = []
    for key in config:
        found.append(f"{prefix}{key}")
        if isinstance(config[key], ConfigDict):
            found += _paths(config[key], f"{prefix}{key}.")
    return found


def _set_untyped(config: ConfigDict, path: str, text: str) -> None:
    """Sets a key that holds None."""
    *parents, key = path.split(".")
    for parent in parents:
        config = config[parent]
    try:
        config[key] = ast.literal_eval(text)
    except UNREADABLE:
        config[key] = text

"""What the verbs share on the command line: ``--config``, ``--workdir``, ``--config.a.b=value`` and a verb's own flags.

    options = parse(argv, default_config="tiny_v3", extra={"prompt": (str, "", "text to go on from")})
    options.config, options.workdir, options.prompt

Every value may stand after ``=`` or as the next word.  Overrides are typed by the config itself (ml_collections
``config_flags``, with flags of our own rather than the process's).  Whatever is wrong comes out as a ``UserError``.
"""

import ast
import contextlib
import dataclasses
import difflib
import importlib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from deepseek_jax.bounds import Bound, in_line
from deepseek_jax.bounds import path as path_bound
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning, _hints
from deepseek_jax.paths import check_local
from deepseek_jax.saved_config import from_json, to_json

__all__ = ["REQUIRED", "from_json", "load", "names", "override", "parse", "to_json", "validate"]

BEGINNING = "train.init_from"
PATHS = (BEGINNING, "data.source", "data.tokenizer", "data.cache_dir", "release.folder")  # keys of files and folders
UNREADABLE = (flags.Error, ValueError, TypeError, SyntaxError, MemoryError, RecursionError)  # what text may raise
REQUIRED = object()  # as the default of a verb's flag: must be given


@dataclasses.dataclass(frozen=True)
class Flag:
    """One ``--name=VALUE``."""

    type: Callable[[str], Any]
    default: Any
    help: str
    bound: Bound | None = None


def parse(
    argv: list[str],
    default_config: str | None = None,
    extra: Mapping[str, tuple] | None = None,
    *,
    config: bool = True,
    workdir: bool = True,
) -> SimpleNamespace:
    """Reads a verb's command line.

    Args:
      argv: the words after the verb.
      default_config: the config taken without ``--config``; None: ``--config`` may be left out and gives config None.
      extra: the verb's own flags, name -> (type, default, help), and a `Bound` after those of a number; underscores
        become dashes on the command line, ``bool`` makes a switch (``--name``, ``--no-name``, ``--name=true``), default
        ``REQUIRED`` asks for a value.
      config: whether the verb takes ``--config`` and its overrides.
      workdir: whether it takes ``--workdir``.

    Returns:
      config (ConfigDict with locked keys, or None), workdir (Path or None), overrides (dotted key -> text as given) and
      the verb's own flags by name.

    Raises:
      UserError: unknown flag or key, unreadable value or config; SystemExit(0) after ``--help``.
    """
    table = {}
    if config:
        table["config"] = Flag(
            str, default_config, "name of a config, .py file with get_config(), or directory of weights to fine-tune"
        )
    if workdir:
        table["workdir"] = Flag(_directory, None, "directory of the run: config, checkpoints, metrics")
    table |= {name.replace("_", "-"): Flag(*flag) for name, flag in (extra or {}).items()}
    if "--help" in argv or "-h" in argv:
        print(_help(table))
        raise SystemExit(0)

    given, overrides = _split(argv, table)
    values = {name: given.get(name, flag.default) for name, flag in table.items()}
    for name, value in values.items():
        if value is REQUIRED:
            raise UserError(f"--{name} is missing. Give --{name}=VALUE: {table[name].help}.")
    name, flag = values.pop("config", None), "--config"
    if "config" in table and "config" not in given and overrides.get(BEGINNING):
        name, flag = overrides[BEGINNING], f"config.{BEGINNING}"  # family, sizes and recipe come from there
    if overrides and name is None:
        raise UserError(f"--config.{next(iter(overrides))} given, but no config. Give --config=NAME as well.")
    resolved = None if name is None else override(load(name, flag), overrides)
    for key in PATHS if resolved is not None else ():
        check_local(str(_get(resolved, key, "")), f"config.{key}")
    others = {key.replace("-", "_"): value for key, value in values.items()}
    return SimpleNamespace(config=resolved, overrides=overrides, **{"workdir": None, **others})


def names() -> list[str]:
    """Returns the configs that ``--config=NAME`` knows, without importing them."""
    spec = importlib.util.find_spec("deepseek_jax.configs")
    folders = (spec and spec.submodule_search_locations) or []
    return sorted(file.stem for folder in folders for file in Path(folder).glob("[!_]*.py") if file.stem != "base")


def load(name: str, flag: str = "--config") -> ConfigDict:
    """Returns the config of a name in ``deepseek_jax.configs``, a ``.py`` file, or a folder of weights to fine-tune.

    ``config.name`` is filled in.  Messages call the name the value of ``flag``.
    """
    check_local(name, flag)
    if flag.endswith(BEGINNING) or (name not in names() and _beginning.is_origin(name)):
        defaults = importlib.import_module("deepseek_jax.configs.base").get_config()
        return _beginning.fine_tuning(_beginning.directory(name, flag), defaults).lock()
    is_path = name.endswith(".py") or "/" in name or "\\" in name
    stem = Path(name).stem if is_path else name
    if is_path and not Path(name).is_file():
        raise UserError(f"{flag}={name}: no such file. Give a path that exists or one of: {', '.join(names())}.")
    if not is_path and name not in (*names(), "base"):
        raise UserError(f"{flag}={name}: no such config. {_nearest(name, names(), 'Configs: ')}")
    try:
        with contextlib.redirect_stdout(sys.stderr):  # what the file prints is no output of the verb
            module = _execute(Path(name)) if is_path else importlib.import_module(f"deepseek_jax.configs.{name}")
            config = module.get_config() if callable(getattr(module, "get_config", None)) else module
        list(_paths(config) if isinstance(config, ConfigDict) else ())
    except UserError:
        raise
    except (Exception, SystemExit) as error:  # whatever a file that the user wrote may raise
        what = f"{type(error).__name__}: {error}".removesuffix(": ")
        raise UserError(f"{flag}={name}: the file raised {in_line(what)}{_place(error)}. Fix it.") from error
    if config is module:
        raise UserError(f"{flag}={name}: the file has no function get_config(). Write one that returns a ConfigDict.")
    if not isinstance(config, ConfigDict):
        raise UserError(f"{flag}={name}: get_config() gave a {type(config).__name__}; it must return a ConfigDict.")
    if "name" in config and (is_path or not config.name):  # a file's parent has named itself already
        config.name = stem
    return config.lock()


def override(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Sets ``a.b`` to a value written as text, typed by what stands there; returns the same config."""
    for path, text in overrides.items():
        old = _lookup(config, path)
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
            expected = _article(type(old).__name__)
            raise UserError(f"config.{path}={in_line(text)}: expected {expected}, like {old!r}.") from error
    return config


def validate(config: ConfigDict, checks: Iterable[Callable[[ConfigDict], str | None]]) -> ConfigDict:
    """Runs checks across fields; each returns None or one sentence of what is wrong and what to do."""
    for check in checks:
        try:
            message = check(config)
        except KeyError as error:
            lack = f"config {config.get('name', '')} lacks the key {error.args[0]}"
            raise UserError(f"{lack}. Start from a config that holds a whole run, like tiny_v3.") from error
        if message:
            raise UserError(message)
    return config


def _split(argv: list[str], table: Mapping[str, Flag]) -> tuple[dict[str, Any], dict[str, str]]:
    """Sorts the words into flag -> typed value and dotted config key -> text; the last of two wins."""
    given, overrides = {}, {}
    words = iter(enumerate(argv))
    for i, word in words:
        if not word.startswith("--") or word == "--":
            hint = _hints.stray_word(word, table, names(), _defaults(table))
            raise UserError(f"{word}: a stray word. {hint}")
        name, equals, text = word[2:].partition("=")
        following = argv[i + 1] if i + 1 < len(argv) and not argv[i + 1].startswith("--") else None
        is_key = name.startswith("config.") and "config" in table
        flag = None if is_key else table.get(name)
        if flag is None and not is_key:
            switch = table.get(name.removeprefix("no-"))
            if equals or switch is None or switch.type is not bool:
                hint = _hints.unknown_flag(word[2:], table, _defaults(table))
                raise UserError(f"--{name}: no such flag. {hint}")
            given[name.removeprefix("no-")] = False
            continue
        if not equals and flag is not None and flag.type is bool:
            given[name] = True
            continue
        if not equals:
            if following is None:
                raise UserError(f"--{name} lacks its value. Write --{name}=VALUE.")
            text = following
            next(words)
        if is_key:
            path = name.removeprefix("config.")
            overrides.pop(path, None)  # keeps the order of the last
            overrides[path] = text
        else:
            given[name] = _convert(name, flag, text)
    return given, overrides


def _defaults(table: Mapping[str, Flag]) -> ConfigDict | None:
    """Returns the keys that every config has, or None for a verb without one."""
    return importlib.import_module("deepseek_jax.configs.base").get_config() if "config" in table else None


def _convert(name: str, flag: Flag, text: str) -> Any:
    """Reads a flag's text by its type."""
    if flag.type is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise UserError(f"--{name}={in_line(text)}: expected true or false.")
        return words[text.lower()]
    if flag.type in (Path, _directory):
        check_local(text, f"--{name}")
        path_bound(1).check(f"--{name}", text)
    try:
        value = flag.type(text)
    except (ValueError, TypeError) as error:
        expected = _article(getattr(flag.type, "__name__", "value"))
        raise UserError(f"--{name}={in_line(text)}: expected {expected} ({flag.help}).") from error
    return value if flag.bound is None else flag.bound.check(f"--{name}", value)


def _directory(text: str) -> Path:
    """Reads a path, with ~ for the home directory."""
    return Path(text).expanduser()


def _get(config: ConfigDict, path: str, default: Any) -> Any:
    """Returns what stands at ``a.b``, or the default where a config has no such key."""
    for part in path.split("."):
        config = config.get(part, default) if isinstance(config, ConfigDict) else default
    return config


def _lookup(config: ConfigDict, path: str) -> Any:
    """Returns what stands at ``a.b``; a misspelt key raises with the nearest one."""
    node, parts = config, path.split(".")
    for depth, part in enumerate(parts):
        if not isinstance(node, ConfigDict) or part not in node:
            near = difflib.get_close_matches(path, _paths(config), n=1, cutoff=0.5)
            siblings = ", ".join(sorted(node)) if isinstance(node, ConfigDict) else "none, it is a value"
            where = ".".join(["config", *parts[:depth]])
            hint = f"Did you mean config.{near[0]}?" if near else f"Keys of {where}: {siblings}."
            raise UserError(f"config.{path}: no such key. {hint}")
        node = node[part]
    return node


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


def _execute(path: Path) -> Any:
    """Imports a config from a file anywhere, so that its own errors point into it."""
    spec = importlib.util.spec_from_file_location(f"config_{re.sub(r'[^0-9A-Za-z_]', '_', path.stem)}", path)
    if spec is None:
        raise UserError(f"--config={path}: not a Python file. Name a file that ends in .py.")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _place(error: BaseException) -> str:
    """Returns " (line N of FILE)" for the innermost frame of an error, "" without one."""
    frame = error.__traceback__
    while frame is not None and frame.tb_next is not None:
        frame = frame.tb_next
    return "" if frame is None else f" (line {frame.tb_lineno} of {frame.tb_frame.f_code.co_filename})"


def _nearest(word: str, known: list[str], otherwise: str) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    listing = f"{otherwise}{', '.join(known)}."
    return f"Did you mean {near[0]}? {listing}" if near else listing


def _article(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _help(table: Mapping[str, Flag]) -> str:
    rows = []
    for name, flag in table.items():
        empty = flag.default is None or flag.default == ""
        note = " (must be given)" if flag.default is REQUIRED else "" if empty else f" (default: {flag.default})"
        rows.append((f"--{name}" if flag.type is bool else f"--{name}=VALUE", flag.help + note))
    if "config" in table:
        rows.append(("--config.a.b=VALUE", "sets one key of the config; see configs/base.py for the keys"))
        rows.append(("", f"configs: {', '.join(names())}"))
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(["options:", *(f"  {left:<{width}}  {right}" for left, right in rows)])

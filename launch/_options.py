"""What the verbs share on the command line: `--config`, `--workdir`, `--config.a.b=value` and a verb's own flags.

    options = parse(argv, default_config="tiny_v3", extra={"prompt": (str, "", "text to continue")})
    options.config, options.workdir, options.prompt

Every value may stand after `=` or as the next word. Whatever is wrong comes out as a `UserError`.
"""

import dataclasses
import sys
from collections import deque
from collections.abc import Callable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ml_collections import ConfigDict

from deepseek_jax import run_config
from deepseek_jax.bounds import Bound, article, in_line
from deepseek_jax.bounds import path as path_bound
from deepseek_jax.configs import base
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _beginning, _hints
from deepseek_jax.paths import check_local
from deepseek_jax.saved_config import RENAMED, leaves
from deepseek_jax.storage import Remote, place

BEGINNING = "run.init_from"
# Keys of files and folders.
PATHS = (
    *(BEGINNING, "lora.init_from", "data.source", "data.tokenizer", "data.cache_dir", "release.folder"),
    "checkpoint.local",
)
IN_BUCKETS = (BEGINNING, "data.source")  # those that may be in a bucket
REQUIRED = object()  # as the default of a verb's flag: must be given


@dataclasses.dataclass(frozen=True)
class Flag:
    """One `--name=VALUE`."""

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
    in_bucket: bool = False,
    of_weights: bool = False,
) -> SimpleNamespace:
    """Reads a verb's command line.

    Args:
      argv: the words after the verb.
      default_config: the config taken without `--config`; None: `--config` may be left out and gives config None.
      extra: the verb's own flags, name -> (type, default, help), and a `Bound` after those of a number; underscores
        become dashes on the command line, `bool` makes a switch (`--name`, `--no-name`, `--name=true`), default
        `REQUIRED` asks for a value.
      config: whether the verb takes `--config` and its overrides.
      workdir: whether it takes `--workdir`.
      in_bucket: whether that may be gs:// or s3://.
      of_weights: whether overrides without `--config` are of the weights that the verb opens (`config_of_weights`).

    Returns:
      config (ConfigDict with locked keys, or None), workdir (Path, `storage.Remote` or None), overrides (dotted key ->
      text as given) and the verb's own flags by name.

    Raises:
      UserError: unknown flag or key, unreadable value or config; SystemExit(0) after `--help`.
    """
    table = _table(default_config, extra or {}, config=config, workdir=workdir)
    if in_bucket:
        table["workdir"] = dataclasses.replace(table["workdir"], type=place)
    if "--help" in argv or "-h" in argv:
        print(_help(table))
        raise SystemExit(0)
    given, overrides = _split(argv, table)
    values = {name: given.get(name, flag.default) for name, flag in table.items()}
    for name, value in values.items():
        if value is REQUIRED:
            raise UserError(f"--{name} is missing. Give --{name}=VALUE: {table[name].help}.")
    name = values.pop("config", None)
    takes_one = config and not (of_weights and "config" not in given)
    resolved = _config(name, overrides, is_named="config" in given) if takes_one else None
    others = {key.replace("-", "_"): value for key, value in values.items()}
    return SimpleNamespace(config=resolved, overrides=overrides, **{"workdir": None, **others})


def _table(default_config: str | None, extra: Mapping[str, tuple], *, config: bool, workdir: bool) -> dict[str, Flag]:
    """Returns the flags of a verb, as they are written."""
    of_config = "name of a config, .py file with get_config(), or directory of weights to fine-tune"
    table = {"config": Flag(str, default_config, of_config)} if config else {}
    if workdir:
        table["workdir"] = Flag(_directory, None, "directory of the run: config, checkpoints, metrics")
    return table | {name.replace("_", "-"): Flag(*flag) for name, flag in extra.items()}


def _config(name: str | None, overrides: Mapping[str, str], *, is_named: bool) -> ConfigDict | None:
    """Returns the config that the command line names or implies, with its overrides; None without any."""
    flag = "--config"
    if not is_named and overrides.get(BEGINNING):  # family, sizes and recipe come from there
        name, flag = overrides[BEGINNING], f"config.{BEGINNING}"
    if name is None and overrides:
        raise UserError(f"--config.{next(iter(overrides))} given, but no config. Give --config=NAME as well.")
    if name is None:
        return None
    return _overridden(load(name, flag), overrides)


def config_of_weights(origin: str, overrides: Mapping[str, str]) -> ConfigDict:
    """Returns the config of a run, or the defaults with a published model, with the overrides of the command line."""
    from deepseek_jax.weights import open_weights

    return _overridden(open_weights(origin).config, overrides)


def _overridden(config: ConfigDict, overrides: Mapping[str, str]) -> ConfigDict:
    """Sets keys of a config; returns it. Raises UserError for a path that is not of this machine, nor in a bucket."""
    values = leaves(run_config.override(config, overrides))
    for key in PATHS:
        text = str(values.get(key, ""))
        if key not in IN_BUCKETS or not isinstance(place(text), Remote):
            check_local(text, f"config.{key}")
    return config


def load(name: str, flag: str = "--config") -> ConfigDict:
    """Returns the config of a name, a `.py` file (`run_config.load`), or a folder of weights to fine-tune."""
    if flag.endswith(BEGINNING) or (name not in run_config.names() and _beginning.is_origin(name)):
        if not isinstance(place(name), Remote):
            check_local(name, flag)
        return _beginning.fine_tuning(_beginning.directory(name, flag), base.get_config()).lock()
    return run_config.load(name, flag)


def _split(argv: list[str], table: Mapping[str, Flag]) -> tuple[dict[str, Any], dict[str, str]]:
    """Sorts the words into flag -> typed value and dotted config key -> text; the last of two wins."""
    given: dict[str, Any] = {}
    overrides: dict[str, str] = {}
    words = deque(argv)
    while words:
        word = words.popleft()
        if not word.startswith("--") or word == "--":
            hint = _hints.unexpected_argument(word, table, run_config.names(), _defaults(table))
            raise UserError(f"{word}: unexpected argument. {hint}")
        name, equals, text = word[2:].partition("=")
        if name.startswith("config.") and "config" in table:
            path = _present(name.removeprefix("config."))
            overrides.pop(path, None)  # keeps the order of the last
            overrides[path] = text if equals else _next_word(name, words)
        elif not equals and _is_switch(table, name):
            given[name] = True
        elif name in table:
            given[name] = _convert(name, table[name], text if equals else _next_word(name, words))
        elif not equals and _is_switch(table, name.removeprefix("no-")):
            given[name.removeprefix("no-")] = False
        else:
            raise UserError(f"--{name}: no such flag. {_hints.unknown_flag(word[2:], table, _defaults(table))}")
    return given, overrides


def _next_word(name: str, words: deque[str]) -> str:
    """Takes the value of a flag that was written without `=`."""
    if not words or words[0].startswith("--"):
        raise UserError(f"--{name} needs a value. Write --{name}=VALUE.")
    return words.popleft()


def _is_switch(table: Mapping[str, Flag], name: str) -> bool:
    return name in table and table[name].type is bool


def _present(path: str) -> str:
    """Returns the name of a config key, reporting on stderr when an earlier one was given."""
    if path not in RENAMED:
        return path
    print(f"note: config.{path} is now called config.{RENAMED[path]}", file=sys.stderr)
    return RENAMED[path]


def _defaults(table: Mapping[str, Flag]) -> ConfigDict | None:
    """Returns the keys that every config has, or None for a verb without one."""
    return base.get_config() if "config" in table else None


def _convert(name: str, flag: Flag, text: str) -> Any:
    """Reads a flag's text by its type."""
    if flag.type is bool:
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if text.lower() not in words:
            raise UserError(f"--{name}={in_line(text)}: expected true or false.")
        return words[text.lower()]
    if flag.type in (Path, _directory, place):
        if flag.type is not place or isinstance(place(text), Path):
            check_local(text, f"--{name}")
        path_bound(1).check(f"--{name}", text)
    try:
        value = flag.type(text)
    except (ValueError, TypeError) as error:
        expected = article(getattr(flag.type, "__name__", "value"))
        raise UserError(f"--{name}={in_line(text)}: expected {expected} ({flag.help}).") from error
    value = value.expanduser() if isinstance(value, Path) else value
    return value if flag.bound is None else flag.bound.check(f"--{name}", value)


def _directory(text: str) -> Path:
    """Reads a path, with ~ for the home directory."""
    return Path(text).expanduser()


def _help(table: Mapping[str, Flag]) -> str:
    rows = []
    for name, flag in table.items():
        empty = flag.default is None or flag.default == ""
        note = " (must be given)" if flag.default is REQUIRED else "" if empty else f" (default: {flag.default})"
        rows.append((f"--{name}" if flag.type is bool else f"--{name}=VALUE", flag.help + note))
    if "config" in table:
        rows.append(("--config.a.b=VALUE", "sets one key of the config; see configs/base.py for the keys"))
        rows.append(("", f"configs: {', '.join(run_config.names())}"))
    width = max((len(left) for left, _ in rows), default=0)
    return "\n".join(["options:", *(f"  {left:<{width}}  {right}" for left, right in rows)])

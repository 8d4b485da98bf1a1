"""`deepseek-jax VERB ...`: a verb is a file of `launch/`, and nothing heavy is imported before the verb is known.

`launch/VERB.py` offers `main(argv) -> int | None`; the first line of its docstring is what `--help` lists, read
from the source by `ast`. The environment variable `DEEPSEEK_JAX_DEBUG=1` shows tracebacks and the libraries' logs.
"""

import ast
import difflib
import importlib
import importlib.metadata
import importlib.util
import os
import platform
import sys
from collections import Counter
from pathlib import Path

import deepseek_jax
from deepseek_jax import streams
from deepseek_jax.errors import UserError
from deepseek_jax.storage import answered

USAGE = """\
usage: deepseek-jax VERB [--config=NAME|FILE.py] [--workdir=DIR] [--config.a.b=VALUE ...]
       deepseek-jax VERB --help
       deepseek-jax --version
"""

# what people ask for by these names, and what there is instead
NO_VERBS = {
    "eval": "Training evaluates on held-out text by itself: see eval_every in configs/base.py.",
}


def verbs() -> dict[str, Path]:
    """Returns verb -> file, in alphabetical order, without importing any."""
    spec = importlib.util.find_spec("deepseek_jax.launch")
    if spec is None or not spec.submodule_search_locations:
        raise UserError("deepseek_jax.launch not found: the package is not installed. Run pip install -e . in a clone.")
    files = (file for folder in spec.submodule_search_locations for file in Path(folder).glob("[!_]*.py"))
    return {file.stem: file for file in sorted(files)}


def docstring(file: Path) -> str:
    """Returns a module's docstring without importing it."""
    return ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""


def overview() -> str:
    """Returns what `deepseek-jax --help` prints: a line a verb."""
    found = verbs()
    width = max(map(len, found), default=0)
    lines = [f"  {verb:<{width}}  {(docstring(file).splitlines() or [''])[0]}" for verb, file in found.items()]
    return f"{USAGE}\n" + "\n".join(["verbs:", *lines])


def version() -> str:
    """Returns what `deepseek-jax --version` prints, all that a bug report needs: versions and devices."""
    lines = [f"deepseek-jax {deepseek_jax.__version__}", f"python {platform.python_version()} ({platform.platform()})"]
    for library in ("jax", "jaxlib", "flax"):
        try:
            lines.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            lines.append(f"{library} is not installed")
    try:
        import jax

        kinds = Counter(f"{device.device_kind} ({device.platform})" for device in jax.devices())
        lines += [f"{count} x {kind}" for kind, count in kinds.items()]
    except (ImportError, RuntimeError) as error:  # a driver that is missing or busy
        lines.append(f"no devices: {error}")
    return "\n".join(lines)


def quieten() -> None:
    """Silences the libraries' own chatter; our messages and jax's warnings remain."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ log: errors only
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")  # every core, and no warning about forks
    from absl import logging

    logging.set_verbosity(logging.ERROR)


def run(argv: list[str]) -> int:
    """Runs one command; errors of the user's come out as UserError."""
    if not argv or argv[0] in ("--help", "-h", "help"):
        print(overview())
        return 0
    if argv[0] == "--version":
        print(version())
        return 0
    verb, arguments = argv[0], argv[1:]
    found = verbs()
    if verb not in found:
        if verb.startswith("-"):
            raise UserError(f"{verb}: the verb comes first, like deepseek-jax train {verb}. Verbs: {', '.join(found)}.")
        if verb in NO_VERBS:
            raise UserError(f"{verb}: no such verb. {NO_VERBS[verb]}")
        near = difflib.get_close_matches(verb, found, n=1)
        hint = f"Did you mean {near[0]}?" if near else f"Verbs: {', '.join(found)}."
        raise UserError(f"{verb}: no such verb. {hint}")
    if "--help" in arguments or "-h" in arguments:
        print(docstring(found[verb]), end="\n\n")
    with answered():
        return importlib.import_module(f"deepseek_jax.launch.{verb}").main(arguments) or 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of the console script: returns the exit code (2 or 75 for an error of the user's, 130 for Ctrl-C)."""
    debug = os.environ.get("DEEPSEEK_JAX_DEBUG", "0") not in ("", "0")
    argv = sys.argv[1:] if argv is None else argv
    streams.open_standard()
    try:
        if not debug and argv and not argv[0].startswith("-"):
            quieten()
        code = run(argv)
        sys.stdout.flush()
        return code
    except UserError as error:
        if debug:
            raise
        streams.Forgiving(sys.stderr).write(f"deepseek-jax: error: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        if debug:
            raise
        return 130
    except BrokenPipeError:  # `deepseek-jax ... | head`: the reader has gone
        return 1
    except OSError as error:
        if error.errno not in streams.PASSING or debug:
            raise
        streams.Forgiving(sys.stderr).write(f"deepseek-jax: error: {error}. Free some space there.\n")
        return 1
    finally:
        streams.settle()  # keeps the interpreter's last flush quiet

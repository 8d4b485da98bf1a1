"""Who may import whom (ARCHITECTURE.md), read from the source: nothing is imported to find out."""

import ast
import itertools
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

# From the bottom up. A package or module imports itself and what stands on lower levels, no neighbour on its own.
LEVELS = (
    ("shapes", "errors", "streams", "files", "units"),
    ("kernels",),
    ("configs", "paths", "bounds", "chips", "storage", "cluster"),
    ("compat", "seeds", "saved_config", "tree"),
    ("precision", "data"),
    ("parallel",),
    ("layers",),
    ("models",),
    ("abstract_model",),
    ("train", "serve", "convert", "eval", "plan"),
    ("rl",),
    ("release", "run_bounds", "on_device", "on_mesh"),
    ("weights", "run_config"),
    ("language_model", "run"),
    ("launch",),
    ("cli",),
    ("__main__",),
)
LEVEL = {part: number for number, parts in enumerate(LEVELS) for part in parts}

# Packages that may import these and the standard library only, besides what is said of them here.
SELF_CONTAINED = {
    "pallas_kernels": ("jax", "pallas_kernels"),
    "configs": ("ml_collections", "deepseek_jax.configs", "deepseek_jax.kernels"),
    "shapes": (),
    "errors": (),
    "streams": (),
}

# What belongs to a mesh stays in parallel/; the step may open the one shard_map of training.
MESH_NAMES = {
    *("PartitionSpec", "NamedSharding", "shard_map", "axis_index", "axis_size"),
    *("psum", "pmean", "pmax", "pmin", "ppermute", "pshuffle", "all_gather", "all_to_all", "psum_scatter"),
    "ragged_all_to_all",
}
MESH_PARTS = ("parallel", "compat", "pallas_kernels")  # axis_index in a kernel is of its own grid
MESH_FILES = ("deepseek_jax/train/step.py",)

# The resolved config is read at the border only.
CONFIG_DICT_PARTS = (
    "launch",
    "configs",
    "models",
    "language_model",
    "weights",
    "release",
    "abstract_model",
    "on_device",
    "on_mesh",
    "saved_config",
    "run",
    "run_bounds",
    "run_config",
)


PACKAGE = "deepseek_jax"  # itself fetches build and load when first asked for, which is not an import


def part_of(module: str) -> str | None:
    """Returns the part of a dotted name; "" is the package itself, None is foreign."""
    first, _, rest = module.partition(".")
    if first == "pallas_kernels":
        return first
    return rest.partition(".")[0] if first == "deepseek_jax" else None


def module_of(path: Path) -> str:
    """Returns the dotted name under which a file of the tree is imported."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] in ("configs", "launch"):
        parts.insert(0, "deepseek_jax")
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


def imported(tree: ast.AST, module: str, is_package: bool) -> list[str]:
    """Returns the dotted names that a file imports, anywhere in it, relative ones resolved."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".") if is_package else module.split(".")[:-1]
                parents = parents[: len(parents) - node.level + 1]
                base = ".".join([*parents, base] if base else parents)
            # `from deepseek_jax import layers` names the part in the alias
            found += [f"{base}.{alias.name}" if base == "deepseek_jax" else base for alias in node.names]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module") and module != PACKAGE:
            found += [name for name in [text_of(node.args[0])] if name]
    return found


def text_of(node: ast.AST) -> str:
    """Returns the text of a literal, of an f-string what comes before its first value; "" for anything else."""
    if isinstance(node, ast.JoinedStr):
        return text_of(node.values[0])
    return node.value if isinstance(node, ast.Constant) and isinstance(node.value, str) else ""


def is_verb(module: str) -> bool:
    """Whether a dotted name is that of a verb: a file of `launch` without a leading underscore."""
    return re.fullmatch(r"deepseek_jax\.launch\.[a-z]\w*", module) is not None


def imported_verbs(tree: ast.AST) -> list[str]:
    """Returns the verbs that a file imports."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            found += [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
    return [name for name in found if is_verb(name)]


def mesh_names(tree: ast.AST) -> list[str]:
    """Returns what a file takes from jax of the names that belong to a mesh."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "jax":
            found += [alias.name for alias in node.names if alias.name in MESH_NAMES]
        elif isinstance(node, ast.Attribute) and node.attr in MESH_NAMES:
            root = node.value
            while isinstance(root, ast.Attribute):
                root = root.value
            if isinstance(root, ast.Name) and root.id in ("jax", "lax"):
                found.append(node.attr)
    return found


def violations(path: str, source: str) -> list[str]:
    """Returns a sentence for each import of a file that the rule forbids."""
    module = module_of(ROOT / path)
    part, tree = part_of(module), ast.parse(source)
    found = []
    for name in imported(tree, module, path.endswith("__init__.py")):
        other, package = part_of(name), name.partition(".")[0]
        if part in SELF_CONTAINED:
            allowed = SELF_CONTAINED[part]
            if package not in sys.stdlib_module_names and not name.startswith(allowed):
                found.append(f"{path} imports {name}; {part} imports {', '.join(allowed) or 'nothing'} only")
        elif other in LEVEL:
            if other != part and LEVEL.get(part, -1) <= LEVEL[other]:
                found.append(f"{path} imports {name}: {part or 'the package'} stands beside or below {other}")
        elif other not in (None, "", "pallas_kernels", "__version__"):
            found.append(f"{path} imports {name}, which is missing in LEVELS")
        if package == "ml_collections" and part not in CONFIG_DICT_PARTS:
            found.append(f"{path} imports ml_collections; only {', '.join(CONFIG_DICT_PARTS)} read a ConfigDict")
        if package in ("configs", "launch", "tests"):
            found.append(f"{path} imports {name}; write deepseek_jax.{name}")
    found += [f"{path} imports the verb {name}; what verbs share is in launch/_*.py" for name in imported_verbs(tree)]
    if part not in MESH_PARTS and path not in MESH_FILES:
        found += [f"{path} uses jax's {name}; the mesh stays in parallel/" for name in mesh_names(tree)]
    return found


def sources() -> list[str]:
    folders = ("deepseek_jax", "configs", "launch", "pallas_kernels")
    return sorted(str(path.relative_to(ROOT)) for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_a_file_imports_only_what_stands_below_it():
    found = [violations(path, (ROOT / path).read_text(encoding="utf-8")) for path in sources()]
    assert [*itertools.chain(*found)] == [] and len(found) > 300


def test_every_package_has_a_level():
    parts = {part_of(module_of(ROOT / path)) for path in sources()} - {"", "pallas_kernels"}
    assert parts <= LEVEL.keys()


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("deepseek_jax/layers/norm.py", "from deepseek_jax.models.v3 import Model"),
        ("deepseek_jax/layers/norm.py", "from deepseek_jax import models"),
        ("deepseek_jax/layers/norm.py", "from ..models import v3"),
        ("deepseek_jax/layers/norm.py", "def f():\n    import deepseek_jax.models.v3"),
        ("deepseek_jax/train/loop.py", "import deepseek_jax.serve.cache"),
        ("deepseek_jax/data/corpus.py", "from deepseek_jax.precision import matmul"),
        ("deepseek_jax/precision/matmul.py", "from deepseek_jax.parallel import mesh"),
        ("deepseek_jax/models/v3.py", "from deepseek_jax.run_config import load"),
        ("deepseek_jax/train/loop.py", "import importlib\nimportlib.import_module('deepseek_jax.language_model')"),
        (
            "deepseek_jax/train/loop.py",
            "from importlib import import_module as f\nimportlib.import_module(f'deepseek_jax.launch.{f}')",
        ),
        ("launch/bench.py", "from deepseek_jax.launch import train"),
        ("launch/bench.py", "from deepseek_jax.launch.train import prepare"),
        ("deepseek_jax/train/loop.py", "from deepseek_jax.launch import _options"),
        ("deepseek_jax/__init__.py", "from deepseek_jax.language_model import build"),
        ("deepseek_jax/train/loop.py", "from ml_collections import ConfigDict"),
        ("deepseek_jax/train/loop.py", "import configs.base"),
        ("deepseek_jax/nowhere/a.py", "import deepseek_jax.elsewhere"),
        ("pallas_kernels/gemm/gpu.py", "from deepseek_jax.shapes import LEGEND"),
        ("pallas_kernels/gemm/gpu.py", "import flax"),
        ("configs/tiny.py", "import jax"),
        ("configs/tiny.py", "from deepseek_jax.models import v3"),
        ("deepseek_jax/layers/norm.py", "from jax.sharding import PartitionSpec as P"),
        ("deepseek_jax/layers/norm.py", "import jax\nx = jax.lax.psum(1, 'expert')"),
        ("deepseek_jax/models/v3.py", "from jax import lax\nx = lax.all_to_all"),
        ("deepseek_jax/train/loop.py", "from jax import shard_map"),
    ],
)
def test_a_planted_violation_is_found(path, line):
    assert violations(path, line)


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("deepseek_jax/layers/norm.py", "from deepseek_jax.layers.base import param"),
        ("deepseek_jax/layers/experts.py", "from deepseek_jax.parallel.alltoall import all_to_all"),
        ("deepseek_jax/parallel/mesh.py", "from jax.sharding import PartitionSpec"),
        ("deepseek_jax/serve/engine.py", "from pallas_kernels.mla_decode import mla_decode"),
        ("configs/tiny_v3.py", "from ml_collections import ConfigDict\nfrom deepseek_jax.configs import base"),
        ("launch/train.py", "from deepseek_jax.train import loop\nimport jax"),
        ("launch/train.py", "from deepseek_jax.launch import _options\nfrom deepseek_jax.launch._tables import x"),
        ("pallas_kernels/gemm/gpu.py", "import functools\nimport jax\nfrom pallas_kernels.gemm import tiles"),
    ],
)
def test_a_lawful_import_passes(path, line):
    assert violations(path, line) == []

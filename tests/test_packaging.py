"""setup.cfg lists what the tree holds, and importing the package is cheap."""

import ast
import configparser
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import deepseek_jax

ROOT = Path(__file__).parent.parent


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def listed(section: str, key: str) -> list[str]:
    return [line for line in setup_cfg()[section][key].splitlines() if line and not line.startswith("#")]


def test_the_list_of_packages_is_the_tree():
    top = {"deepseek_jax": "deepseek_jax", "deepseek_jax.configs": "configs",
           "deepseek_jax.launch": "launch", "pallas_kernels": "pallas_kernels"}  # fmt: skip
    packages = []
    for name, folder in top.items():
        for init in (ROOT / folder).rglob("__init__.py"):
            packages.append(".".join([name, *init.parent.relative_to(ROOT / folder).parts]))
    assert sorted(listed("options", "packages")) == sorted(packages)
    assert dict(line.split(" = ") for line in listed("options", "package_dir")) == top


def test_every_folder_with_code_is_a_package():
    for folder in ("deepseek_jax", "configs", "launch", "pallas_kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            assert (file.parent / "__init__.py").exists(), f"{file.parent} has no __init__.py"


def test_no_dependency_is_pinned():
    extras = setup_cfg()["options.extras_require"]
    every = listed("options", "install_requires") + [line for key in extras for line in listed(extras.name, key)]
    assert not [requirement for requirement in every if "==" in requirement]


def test_pyproject_leaves_the_metadata_to_setup_cfg():
    pyproject = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert pyproject.keys() == {"build-system", "tool"}
    assert pyproject["tool"]["ruff"]["line-length"] == 120


def test_the_installed_package_is_this_one():
    assert importlib.metadata.version("deepseek_jax") == deepseek_jax.__version__
    assert re.fullmatch(r"\d+\.\d+\.\d+", deepseek_jax.__version__)


def test_the_version_is_said_the_same_everywhere():
    versions = re.findall(
        r"^## (\d+\.\d+\.\d+)", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE
    )
    assert versions[0] == deepseek_jax.__version__
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert cited[1] == deepseek_jax.__version__


def test_types_are_offered_to_those_who_check_theirs():
    assert (
        "deepseek_jax = py.typed" in (ROOT / "setup.cfg").read_text() and (ROOT / "deepseek_jax" / "py.typed").exists()
    )


def test_modules_that_are_not_type_checked_exist():
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["mypy"]["overrides"]
    unchecked = [table["module"] for table in tables if table.get("ignore_errors")]
    paths = [ROOT / module.replace(".", "/") for modules in unchecked for module in modules]
    assert (
        len(unchecked) == 1
        and [path for path in paths if not path.with_suffix(".py").exists() and not (path / "__init__.py").exists()]
        == []
    )


@pytest.mark.parametrize(
    "file", [*sorted((ROOT / ".github").rglob("*.yml")), ROOT / ".pre-commit-config.yaml"], ids=str
)
def test_settings_of_other_tools_can_be_read(file):
    yaml = pytest.importorskip("yaml")
    assert yaml.safe_load(file.read_text(encoding="utf-8"))


def test_no_launch_file_bears_the_name_of_a_standard_module():
    assert not {file.stem for file in (ROOT / "launch").glob("[!_]*.py")} & sys.stdlib_module_names - {"inspect"}


def test_every_module_says_what_it_is():
    for folder in ("deepseek_jax", "configs", "launch", "pallas_kernels"):
        for file in (ROOT / folder).rglob("*.py"):
            assert ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))), f"{file} has no docstring"


def test_importing_the_package_or_the_command_line_imports_no_library():
    heavy = "{'jax', 'flax', 'numpy', 'optax', 'grain', 'orbax', 'rich', 'absl', 'ml_collections'}"
    code = (
        "import sys; before = set(sys.modules); import deepseek_jax, deepseek_jax.cli; deepseek_jax.cli.overview();"
        f"print(sorted((set(sys.modules) - before) & {heavy}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_package_offers_build_and_load_and_nothing_made_up():
    assert {"build", "load", "__version__"} <= set(dir(deepseek_jax))
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = deepseek_jax.no_such_name

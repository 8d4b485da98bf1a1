"""The tree in ARCHITECTURE.md is the tree that exists, and what the documents link to is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = ("deepseek_jax", "configs", "launch", "pallas_kernels")
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "BENCHMARKS.md")


def drawn(text: str) -> list[str]:
    """Returns the paths of the first block of a section called The tree; two blanks a level, folders end in a slash."""
    block = text.partition("## The tree\n")[2].split("```")[1]
    paths, folders = [], []
    for line in block.strip("\n").splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        folders[depth:] = [name] if name.endswith("/") else []
        paths.append("".join(folders) if name.endswith("/") else "".join(folders[:depth]) + name)
    return paths


def existing() -> set[str]:
    files = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    folders = {f"{file.parent.relative_to(ROOT).as_posix()}/" for file in files}
    return folders | {file.relative_to(ROOT).as_posix() for file in files if file.name != "__init__.py"}


def test_the_tree_is_the_one_that_exists():
    paths = drawn((ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8"))
    assert len(paths) == len(set(paths))
    assert set(paths) == existing()


def test_a_tree_is_read_as_drawn():
    text = "## The tree\n\n```\na/   first\n  b/   second\n    c.py   third\n  d.py   fourth\ne/   fifth\n```\n"
    assert drawn(text) == ["a/", "a/b/", "a/b/c.py", "a/d.py", "e/"]


@pytest.mark.parametrize("document", DOCUMENTS)
def test_files_that_a_document_names_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = [link.partition("#")[0] for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if link and not (ROOT / link).exists()] == []
    named = re.findall(r"`((?:\w+/)+\w+\.py)`", text)
    places = (ROOT, ROOT / "deepseek_jax")
    allowed = ("path/to/mine.py", "launch/VERB.py")
    assert [path for path in named if path not in allowed and not any((at / path).exists() for at in places)] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_keys_that_a_document_names_exist(document):
    from deepseek_jax.configs import v3_671b

    config = v3_671b.get_config()
    for path in re.findall(r"--config\.([a-z_.]+)=", (ROOT / document).read_text(encoding="utf-8")):
        node = config
        for key in path.split(".") if path != "a.b" else ():
            assert key in node, f"{document}: --config.{path}"
            node = node[key]

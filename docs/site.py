"""Gathers the documentation site: the documents, the notebooks, the docstrings and the configs, where they are.

mkdocs calls the functions whose names begin with on_ (mkdocs.yml: hooks). Nothing is copied and nothing is imported.
"""

import ast
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mkdocs.plugins import event_priority
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
DOCUMENTS = ("README.md", "ARCHITECTURE.md", "BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md")
SECTIONS = ("models", "layers", "parallel", "precision", "data", "train", "serve", "rl", "convert", "plan")


def notebooks() -> list[str]:
    """Returns the notebooks in reading order."""
    return sorted(f"notebooks/{file.name}" for file in (ROOT / "notebooks").glob("*.ipynb"))


def configs() -> list[str]:
    """Returns the names of the configs."""
    return sorted(file.stem for file in (ROOT / "configs").glob("[!_]*.py"))


def modules(folder: Path) -> Iterable[Path]:
    """Yields the public modules below a folder, packages before what they hold."""
    files = sorted(folder.rglob("*.py"), key=lambda file: file.as_posix().replace("__init__.py", ""))
    return (file for file in files if file.stem == "__init__" or not file.stem.startswith("_"))


def reference() -> dict[str, str]:
    """Returns page -> Markdown for the reference: one page per package, in the order of the import list."""
    top = [ROOT / "deepseek_jax" / "__init__.py", *sorted((ROOT / "deepseek_jax").glob("[!_]*.py"))]
    groups = {"deepseek_jax": top}
    groups |= {section: list(modules(ROOT / "deepseek_jax" / section)) for section in SECTIONS}
    groups["pallas_kernels"] = list(modules(ROOT / "pallas_kernels"))
    return {f"reference/{name}.md": f"# {name}\n\n" + "".join(map(directive, files)) for name, files in groups.items()}


def directive(file: Path) -> str:
    """Returns the line by which mkdocstrings inserts a module."""
    parts = file.relative_to(ROOT).with_suffix("").parts
    return f"::: {'.'.join(parts).removesuffix('.__init__')}\n\n"


def card(name: str) -> str:
    """Returns the page of a config: its docstring's first line and its source."""
    source = (ROOT / "configs" / f"{name}.py").read_text(encoding="utf-8")
    first = (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
    return f"# {name}\n\n{first}\n\n```python\n{source}```\n"


def for_the_site(text: str) -> str:
    """Returns a document whose links into the repository lead to pages of the site."""
    text = re.sub(r"\]\((configs/\w+)\.py\)", r"](\1.md)", text)
    text = text.replace("](notebooks)", "](notebooks/00_tour.ipynb)").replace("](LICENSE)", "](LICENSE.md)")
    return text.replace("](docs/", "](")


def pages() -> dict[str, str]:
    """Returns page -> Markdown of everything that is not a file of docs/."""
    found = {name: for_the_site((ROOT / name).read_text(encoding="utf-8")) for name in DOCUMENTS}
    found["LICENSE.md"] = "# Licence\n\n" + (ROOT / "LICENSE").read_text(encoding="utf-8")
    found |= reference()
    return found | {f"configs/{name}.md": card(name) for name in configs()}


def on_config(config: Any) -> Any:
    """Fills in the sections of the navigation that follow from the files."""
    filled = {
        "Notebooks": notebooks(),
        "Reference": list(reference()),
        "Configs": [f"configs/{name}.md" for name in configs()],
    }
    for entry in config.nav:
        if isinstance(entry, dict) and (name := next(iter(entry))) in filled:
            entry[name] = filled[name]
    return config


@event_priority(100)  # before the plugin that recognises notebooks
def on_files(files: Files, config: Any) -> Files:
    """Adds the generated pages, the notebooks and their pictures."""
    for name, content in pages().items():
        files.append(File.generated(config, name, content=content))
    for name in [*notebooks(), *(f"notebooks/{file.name}" for file in (ROOT / "notebooks").glob("*.png"))]:
        files.append(File(name, str(ROOT), config.site_dir, config.use_directory_urls))
    return files


def on_page_content(html: str, page: Any, config: Any, files: Files) -> str:
    """Makes links between notebooks lead to their pages; mkdocs does so in Markdown only."""
    if not page.file.src_uri.endswith(".ipynb"):
        return html
    return re.sub(r'href="(\w+)\.ipynb"', r'href="../\1/"', html)

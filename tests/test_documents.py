"""What the documents promise is true: anchors exist, commands are understood, numbers were measured."""

import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from deepseek_jax import run_config
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _options

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(file.name for file in ROOT.glob("*.md"))
SCRIPTS = sorted(file for folder in ("launch", "configs") for file in (ROOT / folder).glob("*.py"))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def anchors(text: str) -> set[str]:
    """Returns the anchors of a Markdown document's headings, as they are made on GitHub."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", text, flags=re.DOTALL), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_tests_that_documents_name_exist():
    sources = [file.read_text(encoding="utf-8") for file in (ROOT / "tests").rglob("test_*.py")]
    known = {name for source in sources for name in re.findall(r"^def (test_\w+)", source, flags=re.MULTILINE)}
    named = {name for file in DOCUMENTS for name in re.findall(r"`(test_\w+)`", (ROOT / file).read_text("utf-8"))}
    assert named and named <= known, named - known


def in_shell(text: str) -> list[list[str]]:
    """Returns the commands of shell text as words: split at &&, | and >, without comments, broken lines joined."""
    commands = []
    for line in text.replace("\\\n", " ").splitlines():
        command = re.sub(r"(^|\s)#.*", "", line)
        for part in re.split(r"&&|\||>", command) if re.search(r"(^|[ &])(deepseek-jax|pytest) *", command) else ():
            words = shlex.split(part)
            commands += [words] if words else []
    return commands


def of_a_document(text: str) -> list[list[str]]:
    """Returns the commands in the code blocks without a language, and in single backticks."""
    fenced = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    blocks = [block for language, block in fenced if not language]
    spans = re.findall(r"`((?:deepseek-jax|pytest)\s[^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [" ".join(span.replace("…", "").split()) for span in spans]
    return [command for shell in (*blocks, *lines) for command in in_shell(shell)]


def of_a_script(file: Path) -> list[list[str]]:
    """Returns the commands in a module's docstring, each on a line of its own."""
    text = (ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or "").replace("\\\n", " ")
    return [command for line in text.splitlines() if line.startswith("    ") for command in in_shell(line)]


def check(words: list[str], monkeypatch) -> None:
    """Fails if a verb does not understand its words; paths and directories of others need not exist."""
    verb, arguments = words[0], words[1:]
    if verb.startswith(("VERB", "--version")):
        return
    if not arguments:  # a verb is mentioned
        assert (ROOT / "launch" / f"{verb}.py").exists(), verb
        return
    known = (*run_config.names(), "base")
    for i, word in enumerate(arguments):
        if word.startswith("--config=") and word.partition("=")[2] not in known:
            arguments[i] = "--config=tiny_v3"
    arguments = [word for word in arguments if not word.startswith("--config.run.init_from=")]

    class Understood(Exception):
        pass

    parse = _options.parse

    def parse_alone(*args, **kwargs):
        parse(*args, **kwargs)
        raise Understood

    monkeypatch.setattr(_options, "parse", parse_alone)
    with pytest.raises((Understood, SystemExit)):
        importlib.import_module(f"deepseek_jax.launch.{verb}").main(arguments)
    monkeypatch.undo()


def check_all(commands: list[list[str]], monkeypatch) -> None:
    for words in commands:
        if "deepseek-jax" in words:
            check(words[words.index("deepseek-jax") + 1 :], monkeypatch)
        elif "pytest" in words:
            paths = [word for word in words[words.index("pytest") + 1 :] if "/" in word]
            assert [path for path in paths if not (ROOT / path).exists()] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_links_lead_to_headings_that_exist(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    for file, _, anchor in (link.partition("#") for link in re.findall(r"\]\(([^)\s]*#[^)\s]+)\)", text)):
        assert anchor in anchors((ROOT / (file or document)).read_text(encoding="utf-8")), f"{file}#{anchor}"


def test_headings_become_anchors_as_on_github():
    assert anchors("# What is `x`, really?\n```\n# no heading\n```\n## V3's block\n") == {
        "what-is-x-really",
        "v3s-block",
    }


@pytest.mark.parametrize("document", DOCUMENTS)
def test_commands_of_a_document_are_understood(document, monkeypatch):
    check_all(of_a_document((ROOT / document).read_text(encoding="utf-8")), monkeypatch)


@pytest.mark.parametrize("file", SCRIPTS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_commands_of_a_docstring_are_understood(file, monkeypatch):
    check_all(of_a_script(file), monkeypatch)


def test_commands_are_found_and_wrong_ones_are_errors(monkeypatch):
    text = "`deepseek-jax\nplan`\n```\nA=1 deepseek-jax train \\\n --workdir=x && deepseek-jax plan # --no\n```\n"
    both = [["A=1", "deepseek-jax", "train", "--workdir=x"], ["deepseek-jax", "plan"]]
    assert of_a_document(text) == [*both, ["deepseek-jax", "plan"]]
    assert of_a_document("```python\nrun(deepseek-jax train)\n```\nSee `ls`.\n") == []
    for words in (["train", "--no-such-flag"], ["plan", "--config.model.no_such_key=1"]):
        with pytest.raises(UserError):
            check(words, monkeypatch)


def test_the_front_page_says_how_to_begin_and_what_is_missing_on_its_first_screen():
    first = "\n".join(README.splitlines()[:40])
    for text in (
        "git clone",
        "pip install -e . && deepseek-jax train",
        "**Not there yet**",
        "docs/v3.svg",
        "## Evidence",
    ):
        assert text in first


def test_numbers_on_the_front_page_were_measured():
    rows = README.partition("## Evidence\n")[2].partition("\n\nChips,")[0].splitlines()[3:]
    assert len(rows) > 5
    sources = [ROOT / "BENCHMARKS.md", *(ROOT / "tests").rglob("*.py")]
    measured = "".join(file.read_text(encoding="utf-8") for file in sources if file != Path(__file__))
    measured = re.sub(r"(?<=\d)[,_](?=\d)", "", measured)
    for row in rows:
        for number in re.findall(r"\d[\d,]*(?:\.\d+)?(?:e-?\d+)?", row.split("|")[2]):
            plain = number.replace(",", "").rstrip(",")
            assert len(plain) < 3 or re.search(rf"(?<![\d.]){re.escape(plain)}(?!\d)", measured), f"{number}: {row}"


def of_the_site(name: str) -> tuple[str, ...]:
    """Returns a constant of docs/site.py, which needs mkdocs to be imported."""
    body = ast.parse((ROOT / "docs" / "site.py").read_text(encoding="utf-8")).body
    return next(
        ast.literal_eval(node.value) for node in body if isinstance(node, ast.Assign) and node.targets[0].id == name
    )


def test_the_site_holds_every_document_and_every_package():
    assert sorted(of_the_site("DOCUMENTS")) == DOCUMENTS
    folders = {file.parent.name for file in (ROOT / "deepseek_jax").glob("*/__init__.py")}
    assert set(of_the_site("SECTIONS")) == folders


def drawing():
    spec = importlib.util.spec_from_file_location("draw_v3", ROOT / "docs" / "draw_v3.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_picture_is_the_one_that_is_drawn_and_names_files_that_exist():
    svg = (ROOT / "docs" / "v3.svg").read_text(encoding="utf-8")
    assert svg == drawing().picture()
    files = re.findall(r">([\w/]+\.py)<", svg)
    assert len(files) > 10
    assert [file for file in files if not (ROOT / "deepseek_jax" / file).exists()] == []


def luminance(colour: str) -> float:
    """Relative luminance of #rgb or #rrggbb, as WCAG 2 defines it."""
    digits = colour[1:] if len(colour) == 7 else "".join(2 * digit for digit in colour[1:])
    parts = [int(digits[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [part / 12.92 if part <= 0.03928 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("scheme", ["LIGHT", "DARK"])
def test_the_picture_can_be_read_in_light_and_in_dark(scheme):
    colours = getattr(drawing(), scheme)
    for text in ("text", "file"):
        for ground in ("page", "box", "part"):
            low, high = sorted((luminance(colours[text]), luminance(colours[ground])))
            assert (high + 0.05) / (low + 0.05) >= 4.5, (text, ground)  # WCAG 2, level AA

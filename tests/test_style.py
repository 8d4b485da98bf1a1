"""Plain English in docstrings, comments, messages and documents: the words of the style sheet do not occur.

`SHEET` is the style sheet: a pattern, and what to write instead. `CLEAN` names the files that follow it; add yours.
"""

import ast
import io
import json
import re
import tokenize
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

CLEAN = (
    "configs",
    "deepseek_jax/abstract_model.py",
    "deepseek_jax/bounds.py",
    "deepseek_jax/chips.py",
    "deepseek_jax/compat.py",
    "deepseek_jax/convert",
    "deepseek_jax/data",
    "deepseek_jax/files.py",
    "deepseek_jax/kernels.py",
    "deepseek_jax/language_model.py",
    "deepseek_jax/layers",
    "deepseek_jax/models/checks.py",
    "deepseek_jax/paths.py",
    "deepseek_jax/plan",
    "deepseek_jax/precision",
    "deepseek_jax/run.py",
    "deepseek_jax/run_bounds.py",
    "deepseek_jax/run_config.py",
    "deepseek_jax/saved_config.py",
    "deepseek_jax/parallel",
    "deepseek_jax/serve",
    "deepseek_jax/train",
    "deepseek_jax/tree.py",
    "deepseek_jax/units.py",
    "deepseek_jax/weights.py",
    "docs",
    "launch",
    "notebooks",
    "tests/data",
    "tests/layers",
    "tests/precision",
    "tests/serve",
    *("ARCHITECTURE.md", "BENCHMARKS.md", "CHANGELOG.md", "CONTRIBUTING.md", "README.md"),
    *("tests/test_documents.py", "tests/test_notebooks.py", "tests/test_packaging.py"),
)

UNITS = "bytes|tokens?|operations|seconds|hours|days|files?|layers|stages|chips|cards?|parameters|rows?|steps?|one|once"
WHOLES = "token|device|step|day|second|hour|layer|host|pod|row|verb|run|family|sequence|number|epoch|sample|pipeline"

SHEET = {
    r"mend(s|ed|ing)?": "fix",
    r"wanted|wants": "expected, needs",
    r"lack(s|ed|ing)?": "missing, has no",
    r"stray": "unexpected",
    r"(un)?lawful(ly)?|no sound": "valid, invalid",
    r"house|rooms?|floors?": "package, layer, module; space for free memory",
    r"goes on|go on|going on|went on|gone on": "continue, resume",
    r"give(s|n)? way|gave way": "fall back",
    r"told|tells? (of|how|which|what|where|the|apart)": "report, say, separate",
    r"that (is|are) none|a \w+ that is no": "invalid, is not a",
    r"(?<!there )is no (?!longer|more than|other|such|faster|slower)\w+": "is not a",
    r"work(s|ing)? on a token": "active per token",
    r"optimis(er|ers)": "optimizer",
    r"in silence|without a word|in words": "silently; as text",
    r"is shown how far|how far .{0,30} is": "shows the progress of",
    rf"({UNITS}) an? ({WHOLES})": "per",
}
MARKS = {
    r"(?<!`)``(?=\w)": "single backticks",
    r"(?<=[a-z)`])\.  (?=[A-Z`])": "one space after a full stop",
}
PATTERNS = {re.compile(rf"\b({pattern})\b", re.I): instead for pattern, instead in SHEET.items()}
PATTERNS |= {re.compile(pattern): instead for pattern, instead in MARKS.items()}


def prose(source: str) -> list[tuple[int, str]]:
    """Returns (line, text) of every string and comment of a Python file."""
    found = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return found + [(token.start[0], token.string) for token in tokens if token.type == tokenize.COMMENT]


def violations(name: str, source: str) -> list[str]:
    """Returns a sentence for each place of a file that uses a word of the style sheet."""
    parts = prose(source) if name.endswith(".py") else [(1, source)]
    found = []
    for line, text in parts:
        for pattern, instead in PATTERNS.items():
            for match in pattern.finditer(text):
                at = line + text.count("\n", 0, match.start())
                found.append(f"{name}:{at}: {match.group()!r}: write {instead}")
    return found


def files() -> list[str]:
    """Returns the files that follow the style sheet."""
    places = [ROOT / name for name in CLEAN]
    paths = [path for place in places for path in ([place] if place.is_file() else place.rglob("*"))]
    return sorted(str(path.relative_to(ROOT)) for path in paths if path.suffix in (".ipynb", ".md", ".py"))


def cells(notebook: str) -> list[tuple[str, str]]:
    """Returns (".md" or ".py", source) of each cell of a notebook."""
    kinds = {"markdown": ".md", "code": ".py"}
    return [(kinds[cell["cell_type"]], "".join(cell["source"])) for cell in json.loads(notebook)["cells"]]


@pytest.mark.parametrize("name", files())
def test_no_word_of_the_style_sheet_is_used(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    text = re.sub(r"\| write \| instead of \|\n(\|.*\n)+", "", text)  # the style sheet itself, in CONTRIBUTING.md
    parts = cells(text) if name.endswith(".ipynb") else [(name, text)]
    assert [found for kind, source in parts for found in violations(kind, source)] == []


def test_every_place_exists():
    assert [name for name in CLEAN if not (ROOT / name).exists()] == []


@pytest.mark.parametrize(
    "text",
    [
        *("Mend the file.", "wanted a list, found 3", "the row lacks a text", "a stray word", "no lawful name"),
        *(
            "the rooms of the house",
            "Training goes on.",
            "the step gives way",
            "the user is told",
            "a number that is none",
        ),
        *("this is no list", "37B that work on a token", "the optimiser", "ends in silence", "4 bytes a token"),
        *("one file a verb", "see ``open``", "A sentence.  Another one."),
    ],
)
def test_a_planted_violation_is_found(text):
    for source in (f'"""{text}"""', f"x = 1  # {text}", f'raise ValueError(f"{{x}}: {text}")'):
        assert violations("a.py", source), source
    assert violations("a.md", text)


@pytest.mark.parametrize(
    "text",
    [
        *("There is no such file.", "It is no longer there.", "rounded down", "bytes per token", "a token"),
        *("black and slack", "```python", "the table is shown", "recommended", "one more byte"),
    ],
)
def test_plain_words_pass(text):
    assert violations("a.md", text) == []

"""Plain English in docstrings, comments, messages and documents: the words of the style sheet do not occur.

`SHEET` is the style sheet: a pattern, and what to write instead. It holds for every file.
"""

import ast
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

FOLDERS = ("configs", "deepseek_jax", "docs", "launch", "notebooks", "pallas_kernels", "tests")
EXCEPTIONS = ("tests/test_style.py",)  # the sheet itself

UNITS = "bytes|tokens?|operations|seconds|hours|days|files?|layers|stages|chips|cards?|parameters|rows?|steps?|one|once"
WHOLES = "token|device|step|day|second|hour|layer|host|pod|row|verb|run|family|sequence|number|epoch|sample|pipeline"

SHEET = {
    r"mend(s|ed|ing)?": "fix",
    r"wanted|wants": "expected, needs",
    r"lack(s|ed|ing)?": "missing, has no",
    r"stray": "unexpected",
    r"(un)?lawful(ly)?|no sound": "valid, invalid",
    r"house|rooms?|(its own|the same|lower|higher) floors?": "package, layer, module; space for free memory",
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
ANY = re.compile(rf"\b({'|'.join(f'({pattern})' for pattern in SHEET)})\b", re.I)
ANY_MARK = re.compile("|".join(MARKS))


def prose(source: str) -> list[tuple[int, str]]:
    """Returns (line, text) of every string and comment of a Python file."""
    found = [
        (node.lineno, node.value)
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and " " in node.value
    ]
    # What follows a # inside of a string is looked at twice.
    lines = enumerate(source.splitlines(), 1)
    return found + [(number, line[line.index("#") :]) for number, line in lines if "#" in line]


def violations(name: str, source: str) -> list[str]:
    """Returns a sentence for each place of a file that uses a word of the style sheet."""
    parts = prose(source) if name.endswith(".py") else [(1, source)]
    found = []
    for line, text in parts:
        if not (ANY.search(text) or ANY_MARK.search(text)):
            continue
        for pattern, instead in PATTERNS.items():
            for match in pattern.finditer(text):
                at = line + text.count("\n", 0, match.start())
                found.append(f"{name}:{at}: {match.group()!r}: write {instead}")
    return found


def files() -> list[str]:
    """Returns all files with text for people, but for the exceptions."""
    paths = [*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
    names = {str(path.relative_to(ROOT)) for path in paths if path.suffix in (".ipynb", ".md", ".py")}
    return sorted(names - set(EXCEPTIONS))


def cells(notebook: str) -> list[tuple[str, str]]:
    """Returns (".md" or ".py", source) of each cell of a notebook."""
    kinds = {"markdown": ".md", "code": ".py"}
    return [(kinds[cell["cell_type"]], "".join(cell["source"])) for cell in json.loads(notebook)["cells"]]


def test_no_word_of_the_style_sheet_is_used():
    names, found = files(), []
    for name in names:
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r"\| write \| instead of \|\n(\|.*\n)+", "", text)  # the style sheet itself, in CONTRIBUTING.md
        parts = cells(text) if name.endswith(".ipynb") else [("", text)]
        found += [one for kind, source in parts for one in violations(name + kind, source)]
    assert found == [] and len(names) > 500


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

"""Every equation of ARCHITECTURE.md's table stands at the line that computes it, in a file that the table names."""

import re
from pathlib import Path

import pytest

from deepseek_jax.convert import names

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "deepseek_jax"
MARK = re.compile(r"# eqs?\. (\d+)(?:-(\d+))?")


def equations() -> dict[int, list[Path]]:
    """Equation of the V3 report -> the files that the table names for it."""
    found: dict[int, list[Path]] = {}
    for row in (ROOT / "ARCHITECTURE.md").read_text(encoding="utf-8").splitlines():
        if match := re.match(r"\| [\d.]+, eqs?\. (\d+)(?:–(\d+))? \|.*\|(.*)\|", row):
            first, last, files = match.groups()
            paths = [PACKAGE / name for name in re.findall(r"`([\w/]+\.py)`", files)]
            found |= dict.fromkeys(range(int(first), int(last or first) + 1), paths)
    return found


def marked(path: Path) -> list[int]:
    """The equations at the ends of a file's lines of code."""
    code = [line for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#")]
    matches = [match for line in code for match in MARK.finditer(line)]
    return [
        n for first, last in (match.groups() for match in matches) for n in range(int(first), int(last or first) + 1)
    ]


def test_the_table_has_every_equation_of_the_report():
    assert sorted(equations()) == list(range(1, 26))


@pytest.mark.parametrize("number", range(1, 26))
def test_an_equation_is_marked_where_it_is_computed_exactly_once(number):
    paths = equations()[number]
    assert sum(marked(path).count(number) for path in paths) == 1, f"eq. {number} in {[path.name for path in paths]}"


def test_no_other_file_claims_an_equation():
    named = {path for paths in equations().values() for path in paths}
    claims = {path for path in PACKAGE.rglob("*.py") if path not in named and marked(path)}
    assert claims == set()


@pytest.mark.parametrize("file", ["mla", "experts", "mtp"])
def test_the_names_of_a_legend_are_those_of_the_table_of_published_names(file):
    """| ours | report | released name |: a rule of `convert.names` has both ours and theirs."""
    text = (PACKAGE / "layers" / f"{file}.py").read_text(encoding="utf-8")
    rows = [row for row in re.findall(r"^    \| (.*) \|$", text, re.M) if not row.startswith(("---", "ours"))]
    rules = [(rule.theirs, " ".join(rule.ours)) for rule in (*names.BLOCK, *names.MTP, *names.OWN_MTP)]
    assert len(rows) >= 4
    for row in rows:
        ours, *_, theirs = (cell.strip() for cell in row.split("|"))
        for name in re.findall(r"[\w.]+", ours):
            published = re.findall(r"\w+", theirs)
            belonging = [rule for rule, own in rules if name in own.replace(" ", ".")]
            assert belonging, f"{file}: {name} is in no rule"
            is_known = any(set(published) & set(re.findall(r"\w+", rule)) for rule in belonging)
            assert is_known or theirs == "the other names of the layer", f"{file}: {name} is not {theirs}"

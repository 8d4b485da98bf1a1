"""Einsum strings and shape suffixes agree: `y_BTF = einsum("BTD,DF->BTF", x_BTD, self.w_DF[...])`."""

import ast
import re
from pathlib import Path

import pytest

from deepseek_jax.shapes import LEGEND

ROOT = Path(__file__).parent.parent
SUFFIX = re.compile(r"[a-z].*_([A-Z]+)$")  # the trailing capitals of a name that has small letters too


def suffix(node: ast.AST) -> str | None:
    """Returns the letters in which an operand's name ends; None where it has no name or its shape has changed."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "astype":
        return suffix(node.func.value)  # the shape stays
    if isinstance(node, ast.Subscript):
        whole = isinstance(node.slice, ast.Constant) and node.slice.value is Ellipsis
        return suffix(node.value) if whole else None
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    match = SUFFIX.match(name)
    return match.group(1) if match else None


def einsum_of(node: ast.AST) -> tuple[str, list[ast.AST]] | None:
    """Returns the equation without blanks and the operands of an einsum call, None for anything else."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "astype":
        return einsum_of(node.func.value)
    if not isinstance(node, ast.Call):
        return None
    name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
    equations = [arg for arg in node.args if isinstance(arg, ast.Constant) and isinstance(arg.value, str)]
    if name != "einsum" or not equations:
        return None
    equation = re.sub(r"\s", "", equations[0].value)
    operands = [arg for arg in node.args if arg is not equations[0]]
    return equation, operands[: equation.partition("->")[0].count(",") + 1]


def agrees(letters: str, name: str) -> bool:
    """Compares an equation's letters with a name's; ``...`` stands for any leading axes."""
    return name.endswith(letters[3:]) if letters.startswith("...") else letters == name


def violations(source: str) -> list[str]:
    """Returns a sentence for each disagreement in a file."""
    found = []
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, (ast.Name, ast.Attribute)) and einsum_of(node):
            equation, operands = einsum_of(node)
            inputs = equation.partition("->")[0].split(",")
            unknown = sorted(set(re.sub(r"\.\.\.|->|,", "", equation)) - LEGEND.keys())
            if unknown:
                found.append(f"line {node.lineno}: {equation}: {', '.join(unknown)} not in the legend")
            for letters, operand in zip(inputs, operands, strict=False):
                if (name := suffix(operand)) is not None and not agrees(letters, name):
                    found.append(f"line {node.lineno}: {equation}: {letters} is given {ast.unparse(operand)}")
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and len(targets) == 1 and einsum_of(node.value):
            equation, _ = einsum_of(node.value)
            output, name = equation.partition("->")[2], suffix(targets[0])
            if name is not None and not agrees(output, name):
                found.append(f"line {node.lineno}: {equation}: the result is called {ast.unparse(targets[0])}")
        if isinstance(node, (ast.Name, ast.arg)):
            name = node.arg if isinstance(node, ast.arg) else node.id
            match = SUFFIX.match(name)
            if match and set(match.group(1)) - LEGEND.keys():
                found.append(f"line {node.lineno}: {name} ends in a letter that is missing in the legend")
    return list(dict.fromkeys(found))  # a call under .astype is met twice


def sources() -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / "deepseek_jax").rglob("*.py"))


def test_the_suffixes_of_a_file_agree_with_its_einsums():
    found = {path: violations((ROOT / path).read_text(encoding="utf-8")) for path in sources()}
    assert {path: places for path, places in found.items() if places} == {} and len(found) > 200


def test_the_legend_has_one_capital_a_dimension():
    assert all(re.fullmatch("[A-Z]", letter) for letter in LEGEND)
    assert len(set(LEGEND.values())) == len(LEGEND)


@pytest.mark.parametrize(
    "source",
    [
        'y = einsum("BTD,DF->BTF", x_BTF, w)',
        'y = jnp.einsum("BTD,DF->BTF", x_BTD, self.gate_FD[...])',
        'y = einsum("BTD,DF->BTF", x_BTD.astype(f32), self.gate_DF[...].astype(f32), self.z); a_DF = b\n'
        'y_BTD = einsum("BTD,DF->BTF", x_BTD, w_DF)',
        'self.y_BTD = einsum("BTD,DF->BTF", x, w).astype(jnp.float32)',
        'y_BTD: Array = einsum("BTD,DF->BTF", x, w)',
        'y = einsum("btd,df->btf", x, w)',
        'y = einsum(x_BTF, w, "B T D, D F -> B T F")',
        'y = einsum("...D,DF->...F", x_BTF, w)',
    ],
)
def test_a_planted_violation_is_found(source):
    assert violations(source)


@pytest.mark.parametrize(
    "source",
    [
        'y_BTF = einsum("BTD,DF->BTF", x_BTD, self.gate_DF[...], precision)',
        'y_BTF = einsum("...D,DF->...F", x_BTD, w_DF).astype(x_BTD.dtype)',
        'y_BTF = einsum(x_BTD, w_DF, "B T D, D F -> B T F")',
        'y = einsum("TD,DF->TF", x_BTD[0], norm(w_DF))',
        "y = einsum(equation, x_BTD, w_DF)",
        "PEAK_FLOPS = MAX_Z = 1",
    ],
)
def test_a_lawful_line_passes(source):
    assert violations(source) == []

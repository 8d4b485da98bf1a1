"""Facts that one file states: another file that writes them down again would drift apart from it."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(file for folder in ("deepseek_jax", "launch", "configs") for file in (ROOT / folder).rglob("*.py"))
FACTS = {
    "peaks of chips": (r"bf16=989, ", "deepseek_jax/chips.py"),
    "peak memory of a process": (r"VmHWM|ru_maxrss", "deepseek_jax/compat.py"),
    "memory of a machine": (r"SC_PHYS_PAGES", "deepseek_jax/compat.py"),
    "MaxVio": (r"def \w*max_?vio\w*\(", "deepseek_jax/layers/router.py"),
    "sizes of a mesh": (r"data < 1 and data != -1", "deepseek_jax/parallel/mesh.py"),
    "flushing a folder": (r"os\.O_RDONLY\)\n    try:\n        os\.fsync", "deepseek_jax/files.py"),
    "bytes as text": (r'"KiB"', "deepseek_jax/units.py"),
    "durations as text": (r":02d?\}:\{", "deepseek_jax/units.py"),
    "a tuple of logical axes": (
        r"lambda \w+: isinstance\(\w+, tuple\)|def is_axes",
        "deepseek_jax/parallel/sharding.py",
    ),
    "a path of jax's as a name": (r"keystr\(", "deepseek_jax/tree.py"),
    "counting elements": (r"sum\(\w\.size for \w in jax|prod\(\w+\.shape\) for", "deepseek_jax/tree.py"),
    "configs by name": (r"deepseek_jax\.configs\.\{", "deepseek_jax/run_config.py"),
}


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_is_stated_in_one_file(fact):
    pattern, home = FACTS[fact]
    found = [str(file.relative_to(ROOT)) for file in SOURCES if re.search(pattern, file.read_text(encoding="utf-8"))]
    assert found == [home]

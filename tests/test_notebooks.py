"""Every notebook runs from top to bottom, and ends in a check that can fail."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import end_all, fork

FOLDER = Path(__file__).parent.parent / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LARGEST_KB = 150  # a notebook with its pictures

# In a process of its own, whose sockets and event loop are no concern of pytest's. Without folders of kernels, what
# remains is the kernel of this very interpreter, whatever the user has installed elsewhere.
JUPYTER = """
import sys
import nbformat
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

kernel = AsyncKernelManager(kernel_name="python3", kernel_spec_manager=KernelSpecManager(kernel_dirs=[]))
NotebookClient(nbformat.read(sys.argv[1], as_version=4), km=kernel, timeout=590, startup_timeout=300).execute()
"""
COMPUTES = ("12_r1_zero",)  # more than it compiles: for which code is made a little faster than for the other tests
IN_JUPYTER = ("04_published_models",)  # the others run as a kernel runs them, without the seconds that kernels take


def read(file: Path):
    import nbformat

    return nbformat.read(file, as_version=4)


def test_there_are_notebooks():
    assert {file.stem for file in NOTEBOOKS} > set(IN_JUPYTER)


SLOW = (
    "00_tour",
    "01_mla",
    "02_moe_routing",
    "03_mtp",
    "04_published_models",
    "06_fp8",
    "07_latent_attention",
    "08_sparse_attention",
    "09_v4",
    "11_parallelism",
    "12_r1_zero",
    "13_serving",
)  # they compile much
RUNS = [pytest.param(file, marks=[pytest.mark.slow] if file.stem in SLOW else [], id=file.stem) for file in NOTEBOOKS]


def let_engines_pad() -> None:
    """Every engine of this process runs the programs of its largest sizes alone: a third of those to compile."""
    from deepseek_jax.serve.engine import Engine

    made = Engine.__init__

    def padded(self, *arguments, **options) -> None:
        made(self, *arguments, **options)
        self._pads_to_largest = True

    Engine.__init__ = padded


def run_cells(file: Path, folder: Path) -> None:
    """What a fork runs: the cells in IPython's shell, which is what a kernel has inside, pictures included."""
    from IPython.core.interactiveshell import InteractiveShell
    from traitlets.config import Config

    os.chdir(folder)
    let_engines_pad()
    shell = InteractiveShell.instance(
        config=Config({"HistoryManager": {"enabled": False}}), ipython_dir=str(folder.parent / "ipython")
    )
    shell.enable_gui = lambda gui=None: None
    shell.run_line_magic("matplotlib", "inline")
    for cell in json.loads(file.read_text())["cells"]:
        if cell["cell_type"] == "code" and not shell.run_cell("".join(cell["source"])).success:
            sys.exit(1)


@pytest.fixture(autouse=True)
def nothing_left_running():
    """However a test ends, the process that it started does as well."""
    yield
    end_all()


@pytest.mark.parametrize("file", RUNS)
def test_a_notebook_runs(file, tmp_path, monkeypatch):
    here, printed = tmp_path / "here", tmp_path / "printed"
    here.mkdir()
    if file.stem in IN_JUPYTER:
        environment = os.environ | {"JUPYTER_RUNTIME_DIR": str(tmp_path / "jupyter")}
        command = [sys.executable, "-c", JUPYTER, str(file)]
        done = subprocess.run(command, cwd=here, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
    else:
        monkeypatch.syspath_prepend(Path(__file__).parents[1])  # where a fork finds this file
        environment = {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
        if file.stem in COMPUTES:
            environment["XLA_FLAGS"] = os.environ["XLA_FLAGS"] + " --xla_backend_optimization_level=1"
        process = fork(printed, environment, run_cells, file, here)
        process.join(timeout=590)
        assert process.exitcode == 0, printed.read_text()
        assert "<Figure size" in printed.read_text(), "pictures are drawn"
    assert list(here.iterdir()) == [], "a notebook leaves no files"


@pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda file: file.stem)
def test_a_notebook_is_small_and_ends_in_a_check(file):
    cells = read(file).cells
    title, last = cells[0], cells[-1]
    assert title.cell_type == "markdown" and title.source.startswith("# ")
    assert last.cell_type == "code" and any(isinstance(node, ast.Assert) for node in ast.parse(last.source).body)
    assert file.stat().st_size < LARGEST_KB * 1024
    code = "\n".join(cell.source for cell in cells if cell.cell_type == "code")
    assert "deepseek_jax.launch" not in code, "what a notebook needs is in the library"
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    assert not [output for output in outputs if output.output_type == "error" or output.get("name") == "stderr"]

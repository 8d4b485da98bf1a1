"""`bench kernels --tune` with a made-up clock: every candidate once, failures left out, interruptions resumed."""

import json
import sys

import pytest

from deepseek_jax.errors import UserError
from deepseek_jax.launch import _tune_kernels as tuner
from deepseek_jax.launch._tune_kernels import Candidate, Outcome
from pallas_kernels import tile_table
from pallas_kernels.fp8_matmul import tiles
from pallas_kernels.grouped_matmul import tiles as grouped_tiles

SHAPES = {tiles.FORWARD: [(4096, 7168, 2048), (300, 640, 512)], grouped_tiles.FP8: [(4, 256, 640, 512)]}


class Clock:
    """Takes len(name) microseconds; fails for the tiles that it is given."""

    def __init__(self, *failing):
        self.failing, self.measured = failing, []

    def __call__(self, candidate):
        self.measured.append(candidate)
        if candidate.tiles in self.failing:
            return Outcome(0.0, "wrong by 1.0e+00 of the result's norm")
        return Outcome(float(len(candidate.tiles)))


def tune(file, clock, jobs=3):
    tuner.tune(SHAPES, file, "NVIDIA H200", 132, clock, jobs)


def test_the_table_holds_what_was_measured_and_can_be_read(tmp_path, capsys):
    clock, file = Clock("TALL"), tmp_path / "tables" / "chip.json"
    tune(file, clock)
    assert sorted(clock.measured) == sorted(tuner.candidates(SHAPES))
    table = tile_table.load(file)
    assert (table.chip, table.processors) == ("NVIDIA H200", 132)
    assert list(table.microseconds) == list(SHAPES)
    row = table.microseconds[tiles.FORWARD][4096, 7168, 2048]
    assert row == {name: len(name) for name in tiles.VARIANTS[tiles.FORWARD] if name != "TALL"}
    assert tiles.fastest(tiles.FORWARD, 4096, 7168, 2048, table, 132) == tiles.WIDE
    output = capsys.readouterr().out
    assert "fp8_matmul 4096x7168x2048 TALL: wrong by 1.0e+00" in output
    assert f"{len(clock.measured)}/{len(clock.measured)} " in output
    assert [path.name for path in file.parent.iterdir()] == ["chip.json"]


def test_an_interrupted_run_resumes_where_it_stopped(tmp_path):
    class Interrupted(Clock):
        def __call__(self, candidate):
            if len(self.measured) == 4:
                raise KeyboardInterrupt
            return super().__call__(candidate)

    first, second, file = Interrupted(), Clock(), tmp_path / "chip.json"
    with pytest.raises(KeyboardInterrupt):
        tune(file, first, jobs=1)
    with (tmp_path / "chip.json.progress").open("a") as progress:
        progress.write('["fp8_matmul", [4096, 71')  # written while the machine went down
    assert not file.exists()
    tune(file, second)
    assert not set(first.measured) & set(second.measured)
    assert len(first.measured) + len(second.measured) == len(tuner.candidates(SHAPES))
    assert tile_table.load(file).microseconds[grouped_tiles.FP8]


def test_no_table_is_written_without_any_tiles_for_a_shape(tmp_path):
    with pytest.raises(UserError, match="4x256x640x512: none of the tiles could be measured"):
        tune(tmp_path / "chip.json", Clock(*grouped_tiles.VARIANTS[grouped_tiles.FP8]))
    assert not (tmp_path / "chip.json").exists()


@pytest.mark.parametrize(
    "program, expected",
    [
        ("import sys, json; print('noise'); print(json.dumps([len(json.loads(sys.argv[1])), '']))", Outcome(3.0)),
        ("raise SystemExit('CUDA_ERROR_MISALIGNED_ADDRESS')", Outcome(0.0, "failed: CUDA_ERROR_MISALIGNED_ADDRESS")),
    ],
)
def test_a_process_measures_or_fails(program, expected):
    measure = tuner.in_a_process([sys.executable, "-S", "-c", program], timeout=60)
    assert measure(Candidate("fp8_matmul", (1, 2, 3), "WIDE")) == expected


def test_a_process_that_hangs_is_stopped():
    measure = tuner.in_a_process([sys.executable, "-S", "-c", "import time; time.sleep(60)"], timeout=1)
    assert measure(Candidate("fp8_matmul", (1, 2, 3), "WIDE")) == Outcome(0.0, "took longer than 1 s")


def test_every_operation_of_the_tables_has_a_problem_and_a_tolerance():
    operations = {*tiles.VARIANTS, *grouped_tiles.VARIANTS}
    assert operations == set(tuner.PROBLEMS) == set(tuner.TOLERANCE)


def test_a_table_is_json_with_a_line_per_shape(tmp_path):
    table = tile_table.Table("A chip, 80 GB", 132, "0.11.2", "2026-11-28", {"fp8_matmul": {(1, 2, 3): {"WIDE": 1.5}}})
    file = tmp_path / tile_table.file_of(table.chip).name
    tile_table.write(table, file)
    assert file.name == "a_chip_80_gb.json"
    assert '      "1x2x3": {"WIDE": 1.5}\n' in file.read_text()
    assert json.loads(file.read_text())["microseconds"]["fp8_matmul"] == {"1x2x3": {"WIDE": 1.5}}
    assert tile_table.load(file) == table

"""A few hundred malformed directories on every run; `fuzz_safetensors.py` makes them by the thousand."""

import importlib.util
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("fuzz", Path(__file__).parent / "fuzz_safetensors.py")
fuzz = importlib.util.module_from_spec(spec)
spec.loader.exec_module(fuzz)

SEED = 4
NO_HURRY = 60.0  # seconds per case: only the script measures time, this finds what hangs


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is measured on Linux only")
@pytest.mark.parametrize(("target", "cases"), [("files", 300), ("config", 100), ("whole", 60)])
def test_malformed_directories_are_refused_in_one_clear_line(tmp_path, target, cases):
    outcomes = fuzz.run(SEED, {target: range(cases)}, tmp_path, limit_seconds=NO_HURRY)[target]
    assert [f"{target}:{i}: {one.text}" for i, one in enumerate(outcomes) if one.kind == "wrong"] == []
    refused = sum(one.kind == "refused" for one in outcomes)
    assert cases / 2 < refused < cases


def test_cases_are_the_same_for_the_same_seed():
    assert fuzz.make_case("files", 1, 2) == fuzz.make_case("files", 1, 2)
    assert fuzz.make_case("files", 1, 2) != fuzz.make_case("files", 2, 2)


def test_a_silent_wrong_load_would_be_noticed(tmp_path, monkeypatch):
    """The judge itself is tested: a reader that returns other numbers than the file, or errors that name no place."""

    def off_by_one(directory):
        return {name: (dtype, shape, raw, raw[:-1] + b"x") for name, (dtype, shape, raw, _) in read(directory).items()}

    read = fuzz.TRY["files"]
    monkeypatch.setitem(fuzz.TRY, "files", off_by_one)
    outcomes = fuzz.run(7, {"files": range(40)}, tmp_path, limit_seconds=NO_HURRY)["files"]
    assert {one.kind for one in outcomes} == {"refused", "wrong"}
    with pytest.raises(fuzz.Wrong, match="names no place"):
        fuzz.check_message("it is bad", tmp_path, {})
    with pytest.raises(fuzz.Wrong, match="not a clear line"):
        fuzz.check_message(f"{tmp_path}: 1\n2\n3", tmp_path, {})

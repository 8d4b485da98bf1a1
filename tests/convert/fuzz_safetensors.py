"""Malformed published directories by the thousand: each must give one clear line, quickly and in little memory.

    python tests/convert/fuzz_safetensors.py --cases=10000 --seed=0      about one minute
    python tests/convert/fuzz_safetensors.py --only=whole:4711 --seed=0  one case again, with its message

A case is a valid directory with one to three things broken: flipped bytes in headers, truncated files, wrong shapes,
dtypes and offsets, hostile JSON, shards that are missing, swapped, pipes or links, path tricks in the index, senseless
scales, unintended settings in config.json. Three targets share the cases:

    files    open_directory and every tensor in it, 8-bit ones multiplied with their scales
    config   read_json and from_hf
    whole    everything that load does with a directory, except putting the weights on a device

The result must be a UserError of one or two lines that names the directory, file, tensor or key; or, if the damage does
not matter or makes another valid directory, exactly what the published library reads from the same files (files), a
config that agrees with its keys (config), unchanged weights (whole). Never another exception, a warning, more than a
second, or more than 200 MB above the memory of the process before.
"""

import argparse
import collections
import os
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).parent))  # for `malformed`, also when pytest loads this file

from malformed.broken import VALID, make_case
from malformed.directories import write_files
from malformed.judge import CHECK, TRY, Wrong, check_message

from deepseek_jax.errors import UserError

LIMIT_SECONDS, LIMIT_MB = 1.0, 200
TRIES = 3  # of a case that took too long: the machine may have been busy
TARGETS = {"files": 70, "config": 15, "whole": 15}  # share of the cases, in per cent


@dataclass
class Outcome:
    kind: str  # "refused", "unharmed", "valid, other content", "wrong"
    text: str
    seconds: float
    megabytes: float


def resident(which: str) -> float:
    """Memory of the process in MB (Linux): VmRSS, now; VmHWM, the most since `forget_peak`."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1000 for line in file if line.startswith(which))


def forget_peak() -> None:
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def run_case(target: str, seed: int, number: int, scratch: Path, limit_seconds: float = LIMIT_SECONDS) -> Outcome:
    """Makes a case, runs the target on it and judges the result."""
    valid, broken = make_case(target, seed, number)
    directory = scratch / f"{target}-{number}"
    write_files(directory, broken)
    try:
        for left in reversed(range(TRIES)):
            outcome, found = _attempt(target, directory)
            if outcome.seconds <= limit_seconds or outcome.kind == "wrong":
                break
            if not left:
                raise Wrong(f"took {outcome.seconds:.2f} s")
        if outcome.megabytes > LIMIT_MB:
            raise Wrong(f"took {outcome.megabytes:.0f} MB")
        if outcome.kind == "refused":
            check_message(outcome.text, directory, broken)
        elif outcome.kind != "wrong":
            outcome.kind = CHECK[target](directory, found, valid, broken)
    except Wrong as wrong:
        outcome.kind, outcome.text = "wrong", str(wrong)
    finally:
        shutil.rmtree(directory)
    return outcome


def _attempt(target: str, directory: Path) -> tuple[Outcome, object]:
    found, text = None, ""
    forget_peak()
    before, begin = resident("VmRSS"), time.perf_counter()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found, kind = TRY[target](directory), "read"
    except UserError as error:
        kind, text = "refused", str(error)
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt):
            raise
        kind, text = "wrong", "".join(traceback.format_exception(error)[-8:])
    seconds = time.perf_counter() - begin
    return Outcome(kind, text, seconds, max(0.0, resident("VmHWM") - before)), found


def run(seed: int, numbers: dict[str, range], scratch: Path, limit_seconds: float = LIMIT_SECONDS, report=None) -> dict:
    """Runs cases; returns outcomes by target."""
    outcomes = {target: [] for target in numbers}
    for target, chosen in numbers.items():
        for valid in VALID[target]():  # compiling and importing do not count
            directory = scratch / "valid"
            write_files(directory, valid)
            TRY[target](directory)
            shutil.rmtree(directory)
        for number in chosen:
            outcomes[target].append(run_case(target, seed, number, scratch, limit_seconds))
            if report:
                report(target, number, outcomes[target][-1])
    return outcomes


def shares(cases: int) -> dict[str, range]:
    """Returns the cases of each target."""
    return {target: range(round(cases * share / 100)) for target, share in TARGETS.items()}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=10_000, help="in all, shared by the targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="TARGET:NUMBER, one case and its message")
    options = parser.parse_args(argv)
    numbers = shares(options.cases)
    if options.only:
        target, _, number = options.only.partition(":")
        numbers = {target: range(int(number), int(number) + 1)}
    n_wrong = 0

    def report(target: str, number: int, outcome: Outcome) -> None:
        nonlocal n_wrong
        n_wrong += outcome.kind == "wrong"
        if options.only or (outcome.kind == "wrong" and n_wrong <= 20):
            print(f"{target}:{number}: {outcome.kind}: {outcome.text}", flush=True)

    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        outcomes = run(options.seed, numbers, Path(scratch), report=report)
    for target, found in outcomes.items():
        kinds = collections.Counter(outcome.kind for outcome in found)
        slowest = max(range(len(found)), key=lambda i: found[i].seconds)
        largest = max(range(len(found)), key=lambda i: found[i].megabytes)
        print(
            f"{target:6} {len(found):6} cases: {', '.join(f'{n} {kind}' for kind, n in kinds.most_common())}; "
            f"slowest {found[slowest].seconds:.3f} s (case {numbers[target][slowest]}), "
            f"most memory {found[largest].megabytes:.0f} MB (case {numbers[target][largest]})"
        )
    print(f"seed {options.seed}, {time.perf_counter() - begin:.0f} s, {n_wrong} wrong")
    return 1 if n_wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""The tile table of this machine's GPU: `deepseek-jax bench kernels --tune`.

For every operation and shape each of the kernel's tiles is measured in a process of its own: a kernel that fails spoils
the GPU for its process, and one that hangs ends with it. A process first compares the result with the reference; wrong
results, failures and those that take too long are printed and left out. Several processes prepare at a time (importing
and compiling keep a CPU busy), but only one of them uses the GPU.

What was measured is kept in a file beside the table, one JSON line per measurement: an interrupted run resumes there.
When everything has been measured the table is written and that file removed.
"""

import concurrent.futures
import contextlib
import datetime
import fcntl
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deepseek_jax.errors import UserError
from deepseek_jax.precision.quantize import quantize_blocks
from pallas_kernels import tile_table
from pallas_kernels.fp8_matmul import reference, tiles
from pallas_kernels.grouped_matmul import Groups, Scaled
from pallas_kernels.grouped_matmul import tiles as grouped_tiles
from pallas_kernels.quantize.reference import quantize_rows
from pallas_kernels.tile_table import Shape

SET_BYTES = 3e9  # of all input and output sets that a process walks through
TOLERANCE = {"fp8_matmul": 2e-3, "fp8_matmul gradient": 1e-3, "grouped_fp8_matmul": 2e-3}  # |y - expected| / |expected|


class Candidate(NamedTuple):
    """Tiles to measure."""

    operation: str
    shape: Shape
    tiles: str  # their name

    def title(self) -> str:
        """Returns how a line of progress names it."""
        return f"{self.operation} {tile_table.text(self.shape)} {self.tiles}"


class Outcome(NamedTuple):
    """What came of measuring: microseconds, or 0 and why there are none."""

    microseconds: float
    failure: str = ""


Measure = Callable[[Candidate], Outcome]


def candidates(shapes: dict[str, list[Shape]]) -> list[Candidate]:
    """Returns every tiles of every operation for each of its shapes."""
    variants = tiles.VARIANTS | grouped_tiles.VARIANTS
    return [
        Candidate(operation, shape, name)
        for operation, of_operation in shapes.items()
        for shape in of_operation
        for name in variants[operation]
    ]


def tune(shapes: dict[str, list[Shape]], file: Path, chip: str, processors: int, measure: Measure, jobs: int) -> None:
    """Measures what has not been measured yet, then writes the table of `chip`.

    Args:
        shapes: per operation the shapes.
        file: the table.
        chip: name of the GPU.
        processors: how many it has.
        measure: measures one candidate.
        jobs: how many are measured at a time.

    Raises:
        UserError: for some operation and shape no tiles could be measured.
    """
    progress = file.with_name(file.name + ".progress")
    wanted = candidates(shapes)
    done = {candidate: outcome for candidate, outcome in _read(progress) if candidate in wanted}
    if done:
        print(f"{progress}: {len(done)} measurements of an interrupted run are kept")
    file.parent.mkdir(parents=True, exist_ok=True)
    with progress.open("w", encoding="utf-8") as out:
        for candidate, outcome in itertools.chain(list(done.items()), _measured(wanted, done, measure, jobs)):
            out.write(json.dumps([*candidate, *outcome]) + "\n")
            out.flush()
            if candidate not in done:
                done[candidate] = outcome
                finding = outcome.failure or f"{outcome.microseconds:.1f} us"
                print(f"{len(done)}/{len(wanted)} {candidate.title()}: {finding}", flush=True)
    times = _times(wanted, done)
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    tile_table.write(tile_table.Table(chip, processors, jax.__version__, today, times), file)
    progress.unlink()
    print(f"{file}: written")


def _measured(
    wanted: list[Candidate], done: Collection[Candidate], measure: Measure, jobs: int
) -> Iterator[tuple[Candidate, Outcome]]:
    """Measures those not done yet, several at a time, in the order in which they end."""
    with concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        pending = {pool.submit(measure, candidate): candidate for candidate in wanted if candidate not in done}
        try:
            for future in concurrent.futures.as_completed(pending):
                yield pending[future], future.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _read(progress: Path) -> Iterator[tuple[Candidate, Outcome]]:
    """What an interrupted run has measured; a line that was cut short counts as missing."""
    lines = progress.read_text(encoding="utf-8").splitlines() if progress.exists() else []
    for line in lines:
        with contextlib.suppress(json.JSONDecodeError):
            operation, shape, name, *outcome = json.loads(line)
            yield Candidate(operation, tuple(shape), name), Outcome(*outcome)


def _times(wanted: list[Candidate], done: dict[Candidate, Outcome]) -> tile_table.Times:
    """The table's figures; raises UserError for a shape that has none."""
    times: tile_table.Times = {}
    for candidate in wanted:
        row = times.setdefault(candidate.operation, {}).setdefault(candidate.shape, {})
        if not done[candidate].failure:
            row[candidate.tiles] = round(done[candidate].microseconds, 1)
    for operation, by_shape in times.items():
        for shape, row in by_shape.items():
            if not row:
                raise UserError(
                    f"{operation} {tile_table.text(shape)}: none of the tiles could be measured, for the reasons "
                    "printed above. No table was written; run the command again, or without this shape."
                )
    return times


def in_a_process(command: list[str], timeout: float) -> Measure:
    """Returns a function that runs `command` and a candidate as JSON, and reads the outcome from its last line."""

    def measure(candidate: Candidate) -> Outcome:
        arguments = [*command, json.dumps(candidate)]
        try:
            done = subprocess.run(arguments, capture_output=True, text=True, timeout=timeout, stdin=subprocess.DEVNULL)
        except subprocess.TimeoutExpired:
            return Outcome(0.0, f"took longer than {timeout:.0f} s")
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            return Outcome(0.0, f"failed: {last[:300]}")
        return Outcome(*json.loads(done.stdout.splitlines()[-1]))

    return measure


def main(argv: list[str]) -> None:
    """Measures the candidate given as JSON and prints its outcome; argv: the lock's file, seconds, the candidate."""
    lock, seconds = Path(argv[0]), float(argv[1])
    operation, shape, name = json.loads(argv[2])
    print(json.dumps(measured(Candidate(operation, tuple(shape), name), lock, seconds)))


def measured(candidate: Candidate, lock: Path, seconds: float) -> Outcome:
    """Compiles, then takes the GPU for itself, compares and measures."""
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    problem = PROBLEMS[candidate.operation](candidate)
    n_sets = max(2, min(4, int(SET_BYTES // problem.bytes)))
    arguments = jax.eval_shape(problem.draw, jax.random.key(0))
    ours = jax.jit(lambda sets: [problem.product(*one) for one in sets]).lower([arguments] * n_sets).compile()
    error_of = jax.jit(problem.error).lower(jax.eval_shape(problem.product, *arguments), arguments).compile()
    draw = jax.jit(problem.draw).lower(jax.random.key(0)).compile()
    with lock.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        key = jax.random.key(int.from_bytes(os.urandom(4), "little"))
        sets = [draw(jax.random.fold_in(key, i)) for i in range(n_sets)]
        error = float(error_of(ours(sets)[0], sets[0]))
        if not error <= TOLERANCE[candidate.operation]:  # NaN is wrong too
            return Outcome(0.0, f"wrong by {error:.1e} of the result's norm")
        return Outcome(_median(ours, sets, seconds) / n_sets)


def _median(function: Callable, sets: list[tuple], seconds: float, rounds: int = 7) -> float:
    """Median microseconds of a call, after the clocks have risen."""

    def run(repeats: int) -> float:
        begin = time.perf_counter()
        for _ in range(repeats):
            results = function(sets)
        jax.block_until_ready(results)
        return (time.perf_counter() - begin) / repeats

    begin = time.perf_counter()
    while time.perf_counter() - begin < 4 * seconds:
        per_call = run(2)
    repeats = max(2, int(seconds / per_call))
    return statistics.median(run(repeats) for _ in range(rounds)) * 1e6


class Problem(NamedTuple):
    """An operation with operands."""

    draw: Callable  # key -> operands
    product: Callable  # operands -> y, by the kernel
    error: Callable  # y, operands -> |y - expected| / |expected|
    bytes: int  # of operands and result


ROWS = 256  # of the result that are compared


def _relative(found: jax.Array, expected: jax.Array) -> jax.Array:
    return jnp.linalg.norm(found.astype(jnp.float32) - expected) / jnp.linalg.norm(expected)


def dense_problem(candidate: Candidate) -> Problem:
    """A forward product or a weight gradient of normally distributed operands."""
    from pallas_kernels.fp8_matmul import gpu  # Mosaic GPU is not part of every JAX build

    (m, n, k), forward = candidate.shape, candidate.operation == tiles.FORWARD
    options = {"w_block": (128, 128) if forward else (1, 128), "out_dtype": jnp.bfloat16 if forward else jnp.float32}
    processors = jax.devices()[0].core_count
    choice = tiles.VARIANTS[candidate.operation][candidate.tiles]

    def draw(key: jax.Array) -> tuple:
        keys = jax.random.split(key)
        w = jax.random.normal(keys[1], (n, k), jnp.bfloat16)
        quantised = quantize_blocks(w) if forward else quantize_rows(w)
        return *quantize_rows(jax.random.normal(keys[0], (m, k), jnp.bfloat16)), *quantised

    def product(*operands: jax.Array) -> jax.Array:
        return gpu.fp8_matmul(*operands, tiles=choice, n_processors=processors, **options)

    def error(y: jax.Array, operands: tuple) -> jax.Array:
        x, x_scale, w, w_scale = operands
        expected = reference.fp8_matmul(
            x[-ROWS:], x_scale[:, -ROWS:], w, w_scale, w_block=options["w_block"], out_dtype=jnp.float32
        )
        return _relative(y[-ROWS:], expected)

    return Problem(draw, product, error, m * k + n * k + m * n * (2 if forward else 4))


def grouped_problem(candidate: Candidate) -> Problem:
    """Groups of equal sizes, which the kernel does not know."""
    from pallas_kernels.grouped_matmul import pipeline, rows  # Mosaic GPU is not part of every JAX build

    groups, per_group, n, k = candidate.shape
    choice = grouped_tiles.VARIANTS[candidate.operation][candidate.tiles]
    run = pipeline.Run(tiles=choice, n_processors=jax.devices()[0].core_count)

    def draw(key: jax.Array) -> tuple:
        keys = jax.random.split(key)
        w = jax.random.normal(keys[1], (groups, n, k), jnp.bfloat16)
        x = jax.random.normal(keys[0], (groups * per_group, k), jnp.bfloat16)
        sizes = Groups(jnp.full(groups, per_group, jnp.int32))
        return Scaled(*quantize_rows(x)), Scaled(*jax.vmap(quantize_blocks)(w)), sizes

    def product(x: Scaled, w: Scaled, sizes: Groups) -> jax.Array:
        return rows.grouped_fp8_matmul(x, w, sizes, run=run)

    def error(y: jax.Array, operands: tuple) -> jax.Array:
        x, w, _ = operands
        last = slice(-min(ROWS, per_group), None)  # of the last group
        operands = x.codes[last], x.scale[:, last], w.codes[-1], w.scale[-1]
        expected = reference.fp8_matmul(*operands, out_dtype=jnp.float32)
        return _relative(y[last], expected)

    return Problem(draw, product, error, groups * (per_group * k + n * k + 2 * per_group * n))


PROBLEMS = {
    "fp8_matmul": dense_problem,
    "fp8_matmul gradient": dense_problem,
    "grouped_fp8_matmul": grouped_problem,
}

if __name__ == "__main__":
    main(sys.argv[1:])

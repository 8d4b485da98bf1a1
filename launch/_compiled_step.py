"""The process that compiles a training step for devices that need not exist; `_compile` starts it.

Standard input: {"config", "target"} as JSON. Standard output: one JSON object per line, {"phase": name} when a phase
begins and at the end {"result": {…}} or {"error": message}. It is a process of its own because the devices are chosen
when JAX starts.
"""

import json
import math
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import jax
from ml_collections import ConfigDict

from deepseek_jax import run
from deepseek_jax.compat import peak_memory_bytes, quieten_compilation
from deepseek_jax.errors import UserError
from deepseek_jax.parallel.lint import check_collectives
from deepseek_jax.parallel.mesh import make_mesh
from deepseek_jax.parallel.pipeline import branch_runs
from deepseek_jax.parallel.targets import target_devices
from deepseek_jax.parallel.traced import NO_SWITCHES, Switches, carried, collectives
from deepseek_jax.plan.compiled import CompiledStep, read_hlo
from deepseek_jax.saved_config import from_json
from deepseek_jax.train.pipelined import stage_table
from deepseek_jax.train.step import Trainer


class Phases:
    """Reports phases as they begin, and keeps their seconds."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Times a phase."""
        say({"phase": name})
        begin = time.monotonic()
        yield
        self.seconds[name] = round(time.monotonic() - begin, 2)


def say(message: dict) -> None:
    """Writes a line for the process that waits."""
    print(json.dumps(message), flush=True)


def main() -> int:
    """Reads the question, compiles, answers; returns the exit code."""
    quieten_compilation()
    question = json.load(sys.stdin)
    try:
        found = compiled_step(from_json(question["config"]), question["target"])
    except UserError as error:
        say({"error": str(error)})
        return 2
    say({"result": found._asdict()})
    return 0


def compiled_step(config: ConfigDict, target: str) -> CompiledStep:
    """Returns what compiling the step of a run says about it, nothing of which is allocated."""
    phase = Phases()
    with phase("devices"):
        mesh = make_mesh(**config.mesh, devices=target_devices(target, math.prod(config.mesh.values())))
    with phase("shapes"):
        batch = run.abstract_batch(config, mesh)
        trainer = run.trainer(config, mesh)
    with phase("trace"):
        traced = trainer.step.trace(trainer.abstract, batch)
    with phase("lint"):
        check_collectives(traced.jaxpr)  # a step that would hang is not worth compiling
    with phase("lower"):
        lowered = traced.lower()
    with phase("compile"):
        compiled = lowered.compile()
    with phase("read"):
        memory, ranks = compiled.memory_analysis(), switches(config, trainer)
        sent = [collectives(traced.jaxpr, dict(mesh.shape), rank) for rank in ranks]
        in_hlo, n_instructions = read_hlo(compiled.as_text())
    return CompiledStep(
        target=target,
        n_devices=mesh.size,
        seconds=phase.seconds,
        peak_bytes=peak_memory_bytes() or 0,
        state={name: bytes_per_device(tree) for name, tree in trainer.abstract.items()},
        batch=bytes_per_device(batch),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        carried=carried(traced.jaxpr, ranks[0].n_ticks or config.pipeline.micro_batches),
        sent=max(sent, key=lambda rows: sum(row.n_bytes for row in rows)),
        in_hlo=in_hlo,
        n_instructions=n_instructions,
    )


def switches(config: ConfigDict, trainer: Trainer) -> list[Switches]:
    """Returns how often the branches of a step's switches run, on each rank of the pipeline."""
    if trainer.layout is None:
        return [NO_SWITCHES]
    pipeline = run.pipeline(config, run.network_of(config))
    overlap, (_, table) = pipeline.overlaps(trainer.mesh.devices.flat[0].platform), stage_table(trainer.layout)
    each = (branch_runs(table, overlap, rank) for rank in range(trainer.layout.n_ranks))
    return [Switches(len(table.branch), runs) for runs in each]


def bytes_per_device(tree: Any) -> int:
    """Returns the bytes of one device's parts of abstract arrays."""
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    sys.exit(main())

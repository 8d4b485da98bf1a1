"""One layout of `deepseek-jax bench scaling`, in a process of its own.

It is given a JSON object (config, settle, losses, turns, steps), a directory of compiled programs, and the file to
which it writes what it has measured. Once its step is compiled it says so and waits for a line on its standard input.
"""

import json
import os
import re
import statistics
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from deepseek_jax.compat import start_compilation_cache
from deepseek_jax.errors import UserError
from deepseek_jax.launch import _overlap, _profile
from deepseek_jax.launch._bench_step import Ours
from deepseek_jax.launch._scaling import READY
from deepseek_jax.saved_config import from_json

POLL_S = 2


def main(argv: list[str]) -> int:
    """Measures and writes the file; returns the exit code."""
    job, cache, file = json.loads(argv[0]), argv[1], Path(argv[2])
    threading.Thread(target=_end_with_parent, args=(os.getppid(),), daemon=True).start()
    start_compilation_cache(cache)  # a program whose buffers follow the load is not compiled a second time to run it
    try:
        ours = Ours(from_json(job["config"]))
        print(READY, flush=True)
        found = measured(ours, job) if sys.stdin.readline() else {"failed": "nobody waits for the result"}
    except UserError as error:
        found = {"refused": str(error)}
    file.write_text(json.dumps(found))
    return 0


def measured(ours: Ours, job: dict) -> dict[str, Any]:
    """Returns losses of the first steps, seconds of a step in each turn, and what a profile of one step says."""
    import jax

    losses, first = [], 0.0
    for _ in range(job["settle"] + job["losses"]):
        taken = ours.run(1)
        first = first or taken  # a program whose buffers follow the load is compiled in the first step
        losses.append(ours.loss)
        if job["settle"]:
            ours.level()
    seconds, imbalances = [], []
    for _ in range(job["turns"]):
        seconds.append(ours.run(job["steps"]) / job["steps"])
        imbalances.append(imbalance(ours.loads, job["config"]["mesh"]["expert"]))
    return {
        "losses": losses[job["settle"] :],
        "seconds": seconds,
        "imbalance": statistics.mean(imbalances),
        "sent_bytes": float(ours.report.sent.within + ours.report.sent.across) / ours.trainer.mesh.size,
        "compile_seconds": ours.compile_seconds + first,
        "peak_memory_bytes": ours.peak_memory_bytes,
        "n_params": ours.n_params,
        # emulated devices share their threads
        **(profiled(ours) if jax.default_backend() == "gpu" else {"profile": {}, "table": []}),
    }


def imbalance(loads: list, n_devices: int) -> float:
    """Returns the rows of the busiest device's experts over those of a device on average, mean over the routers."""
    import numpy as np

    of_devices = [np.asarray(load).reshape(-1, n_devices, load.shape[-1] // n_devices).sum(-1) for load in loads]
    return float(np.mean([np.max(row) / np.mean(row) for rows in of_devices for row in rows])) if of_devices else 1.0


def profiled(ours: Ours) -> dict[str, Any]:
    """Returns of one step `_overlap.summary`, and the lines of `_profile.table`."""
    with tempfile.TemporaryDirectory() as folder:
        _profile.trace(folder, lambda: ours.run(1))
        events = _profile.device_events(_profile.newest_trace(Path(folder)))
    program, main_branches = ours.program(), both_passes(ours)
    known = _profile.operations(program)

    def is_main(name: str) -> bool:
        branch = re.search(r"branch_(\d+)_fun", known[name].scope) if name in known else None
        return branch is not None and int(branch[1]) in main_branches

    return {"profile": _overlap.summary(events, is_main), "table": _profile.table(events, program, 1)}


def both_passes(ours: Ours) -> set[int]:
    """Returns the branches of a pipeline's switch that run a forward and a backward pass at once."""
    from deepseek_jax.train.pipelined import stage_table

    if not ours.trainer.layout:
        return set()
    _, table = stage_table(ours.trainer.layout)
    return {number for number, branch in enumerate(table.branches) if len(branch) > 2}


def _end_with_parent(parent: int) -> None:
    """Ends this process when its parent has ended, so that nobody computes for nobody."""
    while os.getppid() == parent:
        time.sleep(POLL_S)
    os._exit(1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

"""A script on torch that a bench compares with, in a process of its own and in another interpreter if need be."""

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from ml_collections import ConfigDict

from deepseek_jax.errors import UserError


class PeerProcess:
    """Runs a script beside this file, which gets `job` as JSON and answers each line with a line of JSON.

    Its first line says that it is ready, and goes to `ready`.
    """

    def __init__(self, script: str, job: dict, python: str):
        job |= {"threads": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()}
        command = [python, "-P", str(Path(__file__).with_name(script)), json.dumps(job)]
        pipe = subprocess.PIPE
        self.complaints = tempfile.TemporaryFile("w+", errors="replace")  # a pipe that nobody reads may fill up
        try:
            self.process: Any = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self.complaints, text=True)
        except OSError as error:
            self.complaints.close()
            raise UserError(f"--peer-python={python}: cannot be run ({error.strerror}). Give a Python.") from error
        try:
            self.ready = self._answer(python)
        except BaseException:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()  # closes its pipes and waits
        self.complaints.close()

    def ask(self, line: str) -> dict:
        """Returns the answer to a line."""
        with contextlib.suppress(BrokenPipeError):  # it has ended: its last message is reported below
            self.process.stdin.write(f"{line}\n")
            self.process.stdin.flush()
        return self._answer("the peer")

    def _answer(self, who: str) -> dict:
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.complaints.seek(0)
            last = (self.complaints.read().strip().splitlines() or ["no message"])[-1]
            raise UserError(
                f'{who}: the peer ended: {last}\nInstall it with pip install "deepseek_jax[parity]", name an '
                "interpreter that has it with --peer-python, or leave it out with --no-peer."
            )
        return json.loads(line)


def transformers_sizes(config: ConfigDict) -> dict:
    """The `DeepseekV3Config` of a config's model."""
    if config.family != "v3" or config.model.mtp_depth:
        raise UserError(
            f"{config.name}: the peer trains a V3 without MTP. Set --config.model.mtp_depth=0 or --no-peer."
        )
    from deepseek_jax.convert.hf_config import to_hf

    return to_hf(config.family, config.model.to_dict(), dtype="float32") | {"use_cache": False}


def in_turns(sides: Mapping[str, Any], n_turns: int, n_steps: int) -> dict[str, list]:
    """Returns what each side's `run(n_steps)` gave, in turns; one turn more comes first, to warm up."""
    found: dict[str, list] = {name: [] for name in sides}
    for turn in range(n_turns + 1):
        for name, side in sides.items():
            taken = side.run(n_steps)
            if turn:
                found[name].append(taken)
    return found

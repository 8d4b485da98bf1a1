"""Profiles on demand: of a range of steps, into the workdir, and by a server that xprof and TensorBoard can ask.

deepseek-jax train … --config.profile.first=100 --config.profile.steps=3     # of process 0: profiles/process_0
deepseek-jax train … --config.profile.port=9012                              # on every host, at any time
"""

from pathlib import Path

import jax

from deepseek_jax.errors import UserError

PROFILES = "profiles"  # folder of a workdir
LAST_PORT = 65_535


class Profiles:
    """The profiles of a run; a context manager, for a run may end within a range.

    Args:
        workdir: receives profiles/process_K.
        port: of process 0's server, process K's is at port + K; 0: no server.
        first, steps: the range, the first step being 1; steps=0: none.
        process: that is profiled, -1: all.

    Raises UserError: the port of the last process would be above 65,535.
    """

    def __init__(self, workdir: Path, *, port: int, first: int, steps: int, process: int):
        index, last = jax.process_index(), port + jax.process_count() - 1
        if port and last > LAST_PORT:
            raise UserError(
                f"config.profile.port={port}: the last process's server would be at {last}, and the last port is "
                f"{LAST_PORT}. Set it to {LAST_PORT - jax.process_count() + 1} at most."
            )
        self.folder = workdir / PROFILES / f"process_{index}"
        is_meant = steps > 0 and process in (-1, index)
        self._range = range(first, first + steps) if is_meant else range(0)
        self._is_tracing = False
        self._server = jax.profiler.start_server(port + index) if port else None

    def __enter__(self) -> "Profiles":
        return self

    def __exit__(self, *error: object) -> None:
        self._stop()
        if self._server is not None:
            jax.profiler.stop_server()

    def before(self, step: int) -> None:
        """Begins or ends the profile where `step` is about to be made."""
        if step in self._range and not self._is_tracing:
            jax.profiler.start_trace(str(self.folder))
            self._is_tracing = True
        elif step not in self._range:
            self._stop()

    def _stop(self) -> None:
        if self._is_tracing:
            self._is_tracing = False
            jax.profiler.stop_trace()

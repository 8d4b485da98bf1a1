"""Processes that begin as forks of one that has imported everything: many starts without the seconds of imports."""

import gc
import multiprocessing
import os
from collections.abc import Callable, Mapping
from pathlib import Path

FORKS = multiprocessing.get_context("forkserver")
# The first fork starts the server, whichever test makes it; importing starts no backend of jax.
MODULES = ("pytest", "IPython", "matplotlib.pyplot", "matplotlib_inline.backend_inline", "tensorboardX")
MODULES += ("deepseek_jax.run", "deepseek_jax.launch.train", "deepseek_jax.launch.r1", "deepseek_jax.language_model")
MODULES += ("deepseek_jax.train.loop", "deepseek_jax.rl.loop")
STARTED: list[multiprocessing.Process] = []


def fork(printed: Path, environment: Mapping[str, str], function: Callable[..., None], *arguments):
    """A process that runs the function, begun: what it prints is appended to a file, its environment is added to."""
    FORKS.set_forkserver_preload([*MODULES])
    process = FORKS.Process(target=_begin, args=(printed, dict(environment), function, *arguments), daemon=True)
    STARTED.append(process)
    process.start()
    return process


def end_all() -> None:
    """Kills what still runs."""
    while STARTED:
        process = STARTED.pop()
        process.kill()
        process.join()


def _begin(printed: Path, environment: dict[str, str], function: Callable[..., None], *arguments) -> None:
    """What a fork runs."""
    gc.set_threshold(50_000, 20, 50)
    with printed.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    function(*arguments)


def one_device() -> dict[str, str]:
    """What to add to the environment of a process with one device."""
    return {"XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=1"}

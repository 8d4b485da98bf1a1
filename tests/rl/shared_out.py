"""An update in one of several processes, which divide the experts: `python shared_out.py OUT`; see `test_rollout`."""

import sys
from pathlib import Path

from deepseek_jax.compat import start_processes

start_processes()

import jax  # noqa: E402
import numpy as np  # noqa: E402
import test_rollout as own  # noqa: E402

from deepseek_jax.parallel.mesh import fetched  # noqa: E402
from deepseek_jax.rl.rewards import Rewards  # noqa: E402


def main(out: str) -> None:
    """Draws, scores and learns; the first process writes what came of it."""
    with Rewards(own.WEIGHTS) as rewards:
        learner = own.make_learner(rewards, 1, jax.device_count(), routes=True)
        found = own.first_update(learner, fetched(learner.trainer.init(0)))
        cut = [own.loop(learner, Path(out).with_name("run"), steps) for steps in (1, 2)]
    if jax.process_index() == 0:
        np.savez(out, *jax.tree.leaves(found), cut[-1][own.TAKEN_AT])


if __name__ == "__main__":
    main(sys.argv[1])

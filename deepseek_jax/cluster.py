"""Where a process stands in its run, from the variables that its cluster sets; no jax.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID   say it outright
    JOBSET_JOB_INDEX, JOBSET_PODS_PER_JOB, JOB_COMPLETION_INDEX  a pod of a Kubernetes JobSet of several jobs (slices);
                                                                 the first two as launch/cluster/ sets them
    SLURM_…, OMPI_…, TPU_…, MEGASCALE_…, KUBERNETES_…            JAX finds the others (jax.distributed.initialize)

Under SLURM, JAX gives a process the one GPU with the number of its task on the node: with one task for eight GPUs,
seven are idle and nobody says so, and where each task sees a GPU of its own, all but the first have none. `place`
divides the visible GPUs evenly over the tasks of a node, unless each task sees its own (--gpus-per-task).
"""

from collections.abc import Mapping
from typing import NamedTuple

ADDRESS, NUMBER, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
DEVICES = "JAX_LOCAL_DEVICE_IDS"


class Place(NamedTuple):
    """What is known of a process's place among several; JAX looks up what is None.

    Attributes:
        coordinator_address: host:port of process 0.
        num_processes: of the run.
        process_id: of this one, from 0.
        local_device_ids: GPUs of this process among those that it sees.
    """

    coordinator_address: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    local_device_ids: list[int] | None = None

    def given(self) -> dict:
        """Returns what is known, as arguments of `jax.distributed.initialize`."""
        return {name: value for name, value in self._asdict().items() if value is not None}


def place(variables: Mapping[str, str]) -> Place | None:
    """Returns the place of a process with these environment variables, None for one that runs alone.

    Raises ValueError: a variable that holds a number does not, or the GPUs of a node do not divide over its tasks.
    """
    address, number, index = (variables.get(name, "") for name in (ADDRESS, NUMBER, INDEX))
    if not address and (number == "1" or not (number or indications(variables))):
        return None
    if not index and all(variables.get(name) for name in ("JOBSET_JOB_INDEX", "JOBSET_PODS_PER_JOB")):
        job, pods = int(variables["JOBSET_JOB_INDEX"]), int(variables["JOBSET_PODS_PER_JOB"])
        index = str(job * pods + int(variables.get("JOB_COMPLETION_INDEX", "0")))
    return Place(
        address or None,
        int(number) if number else None,
        int(index) if index else None,
        None if variables.get(DEVICES) else _gpus_under_slurm(variables),
    )


def indications(variables: Mapping[str, str]) -> list[str]:
    """Returns the variables of clusters that indicate several processes (of a Job in Kubernetes: of any number)."""
    numbers = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
    found = [name for name in numbers if variables.get(name, "1") not in ("", "0", "1")]
    found += [name for name in ("TPU_WORKER_HOSTNAMES", "TPU_PROCESS_ADDRESSES") if "," in variables.get(name, "")]
    job = ("KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX")
    return found + [name for name in job if set(job) <= variables.keys()]


def _gpus_under_slurm(variables: Mapping[str, str]) -> list[int] | None:
    """Returns the visible GPUs that belong to this task of its node; None where SLURM does not say what is visible.

    Raises ValueError: the tasks of a node cannot divide its GPUs evenly.
    """
    local, tasks, nodes = (variables.get(f"SLURM_{name}", "") for name in ("LOCALID", "NTASKS", "STEP_NUM_NODES"))
    visible = variables.get("CUDA_VISIBLE_DEVICES", "")
    n_visible = len(visible.split(",")) if visible else int(variables.get("SLURM_GPUS_ON_NODE") or 0)
    if not (local and tasks and nodes and n_visible):
        return None
    per_task = variables.get("SLURM_GPUS_PER_TASK", "").rpartition(":")[2]  # "4" or "h200:4"
    is_bound = per_task == str(n_visible) or int(variables.get("SLURM_GPUS_ON_NODE") or 0) > n_visible
    if n_visible == 1 or is_bound:  # each task sees its own
        return [*range(n_visible)]
    n_here, rest = divmod(int(tasks), int(nodes))
    if rest:
        return None
    if n_visible % n_here:
        raise ValueError(
            f"{n_here} tasks per node cannot divide its {n_visible} GPUs evenly: start as many as divide them, or set "
            f"{DEVICES} in each"
        )
    share = n_visible // n_here
    return [*range(int(local) * share, (int(local) + 1) * share)]

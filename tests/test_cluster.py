"""The place of a process from the variables of its cluster."""

import pytest

from deepseek_jax.cluster import Place, indications, place

SLURM = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "3"}
SLURM |= {"SLURM_LOCALID": "1", "SLURM_STEP_NODELIST": "n[1-2]"}
JOBSET = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "2"}
GIVEN = {"JAX_COORDINATOR_ADDRESS": "a-0-0.a:8476", "JAX_NUM_PROCESSES": "16"}
EIGHT = "0,1,2,3,4,5,6,7"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({}, None),
        ({"JAX_NUM_PROCESSES": "1", **SLURM}, None),
        ({"SLURM_NTASKS": "1"}, None),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, None),
        (GIVEN | {"JAX_PROCESS_ID": "3"}, Place("a-0-0.a:8476", 16, 3)),
        (SLURM, Place()),  # no GPU: JAX knows all that is needed
        (GIVEN | JOBSET | {"JAX_PROCESS_ID": "2"}, Place("a-0-0.a:8476", 16, 2)),
        (GIVEN | JOBSET | {"JOBSET_JOB_INDEX": "3", "JOBSET_PODS_PER_JOB": "4"}, Place("a-0-0.a:8476", 16, 14)),
        (JOBSET, Place()),
        ({"TPU_WORKER_HOSTNAMES": "a,b", "TPU_WORKER_ID": "1"}, Place()),
        ({"JAX_NUM_PROCESSES": "8"}, Place(num_processes=8)),  # a TPU VM: JAX asks the metadata server
    ],
)
def test_a_process_finds_its_place(variables, expected):
    assert place(variables) == expected


@pytest.mark.parametrize(
    ("change", "devices"),
    [
        ({"CUDA_VISIBLE_DEVICES": "0,1"}, [1]),  # a task for each GPU
        ({"SLURM_GPUS_ON_NODE": "2"}, [1]),
        ({"CUDA_VISIBLE_DEVICES": "5"}, [0]),  # a task that sees its own alone
        ({"CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_NTASKS": "2", "SLURM_LOCALID": "0"}, [0, 1, 2, 3, 4, 5, 6, 7]),
        ({"CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_NTASKS": "16", "SLURM_LOCALID": "6"}, [6]),
        ({"CUDA_VISIBLE_DEVICES": EIGHT}, [4, 5, 6, 7]),  # two tasks on a node
        # --gpus-per-task=4: SLURM has divided the eight already, and numbers those that a task sees from 0
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_ON_NODE": "8"}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "4"}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": "0,1,2,3", "SLURM_GPUS_PER_TASK": "h200:4"}, [0, 1, 2, 3]),
        ({"CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_GPUS_PER_TASK": "4", "SLURM_GPUS_ON_NODE": "8"}, [4, 5, 6, 7]),
        ({"CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_NTASKS": "5"}, None),
        ({"CUDA_VISIBLE_DEVICES": "0,1", "JAX_LOCAL_DEVICE_IDS": "0"}, None),
    ],
)
def test_tasks_of_a_node_divide_its_gpus(change, devices):
    assert place(SLURM | change).local_device_ids == devices


def test_gpus_that_do_not_divide_over_the_tasks_are_an_error():
    variables = SLURM | {"CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_NTASKS": "6"}
    with pytest.raises(ValueError, match="3 tasks per node cannot divide its 8 GPUs evenly"):
        place(variables)
    assert place(variables | {"JAX_LOCAL_DEVICE_IDS": "0,1"}).local_device_ids is None


@pytest.mark.parametrize("n_tasks", [1, 2, 4, 8])
def test_all_gpus_of_a_node_are_used_once(n_tasks):
    variables = SLURM | {"CUDA_VISIBLE_DEVICES": EIGHT, "SLURM_NTASKS": str(2 * n_tasks)}
    found = [place(variables | {"SLURM_LOCALID": str(task)}).local_device_ids for task in range(n_tasks)]
    assert [gpu for gpus in found for gpu in gpus] == [*range(8)]


def test_pods_of_all_jobs_have_numbers_of_their_own():
    known = GIVEN | JOBSET | {"JOBSET_PODS_PER_JOB": "4"}
    found = [
        place(known | {"JOBSET_JOB_INDEX": str(job), "JOB_COMPLETION_INDEX": str(pod)}).process_id
        for job in range(4)
        for pod in range(4)
    ]
    assert found == [*range(16)]


def test_what_is_known_is_handed_on_and_nothing_else():
    assert Place().given() == {} and Place(process_id=0, num_processes=2).given() == {
        "num_processes": 2,
        "process_id": 0,
    }
    assert indications(SLURM | JOBSET) == ["SLURM_NTASKS", "KUBERNETES_SERVICE_HOST", "JOB_COMPLETION_INDEX"]


def test_a_number_that_is_not_one_is_an_error():
    with pytest.raises(ValueError, match="two"):
        place({"JAX_NUM_PROCESSES": "two"})

"""The recipes of launch/cluster/ are valid, their numbers agree, and their words are understood by the verbs.

Kubernetes' schemas and the linters come from the packages of .ci/recipes.txt; what is not installed is skipped.
"""

import shutil
import subprocess
from pathlib import Path

import pytest

from deepseek_jax.cluster import Place, place
from deepseek_jax.launch import _options, supervise, train

yaml = pytest.importorskip("yaml")

FOLDER = Path(__file__).parent.parent / "launch" / "cluster"
JOBSETS = sorted(FOLDER.glob("*.yaml"))
NAME = "jobset.sigs.k8s.io/jobset-name"
NUMBER = "batch.kubernetes.io/job-completion-index"
# What JobSet v1alpha2 knows of the fields that recipes use: names and types; `template` is a Job's, checked as one.
JOBSET = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str, "annotations": dict},
    "spec": {
        "network": {"enableDNSHostnames": bool, "subdomain": str},
        "failurePolicy": {"maxRestarts": int, "restartStrategy": str},
        "successPolicy": {"operator": str, "targetReplicatedJobs": list},
        "startupPolicy": {"startupPolicyOrder": str},
        "suspend": bool,
        "replicatedJobs": [{"name": str, "replicas": int, "template": {"spec": dict, "metadata": dict}}],
    },
}


def unknown(value: object, known: object, path: str = "") -> list[str]:
    """Returns the fields that a schema does not know, or of another type."""
    if isinstance(known, type):
        return [] if type(value) is known else [f"{path}: {value!r}"]
    if isinstance(known, list):
        return [found for index, item in enumerate(value) for found in unknown(item, known[0], f"{path}[{index}]")]
    found = [f"{path}.{key}" for key in value.keys() - known.keys()]
    return found + [
        each for key in value.keys() & known.keys() for each in unknown(value[key], known[key], f"{path}.{key}")
    ]


def read(file: Path) -> tuple[dict, dict, dict]:
    """Returns a JobSet, the one group of jobs in it, and the container of its pods."""
    jobset = yaml.safe_load(file.read_text())
    (group,) = jobset["spec"]["replicatedJobs"]
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    return jobset, group, container


@pytest.mark.parametrize("file", JOBSETS, ids=lambda file: file.stem)
def test_a_jobset_has_known_fields_only(file):
    jobset, group, _ = read(file)
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    assert unknown(jobset, JOBSET) == []
    group["template"]["parallelism"] = 4  # one level too high
    assert unknown(jobset, JOBSET) == [".spec.replicatedJobs[0].template.parallelism"]


@pytest.mark.parametrize("file", JOBSETS, ids=lambda file: file.stem)
def test_its_jobs_pass_the_schema_of_kubernetes(file):
    validate = pytest.importorskip("kubernetes_validate")
    _, group, container = read(file)
    job = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}, "spec": group["template"]["spec"]}
    validate.validate(job, "1.31", strict=True)
    container["imagePullPolice"] = "Always"
    with pytest.raises(validate.ValidationError):
        validate.validate(job, "1.31", strict=True)


@pytest.mark.parametrize("file", JOBSETS, ids=lambda file: file.stem)
def test_as_many_pods_as_processes_and_none_comes_back_alone(file):
    _, group, container = read(file)
    spec = group["template"]["spec"]
    assert spec["parallelism"] == spec["completions"] and spec["completionMode"] == "Indexed"
    assert spec["backoffLimit"] == 0 and spec["template"]["spec"]["restartPolicy"] == "Never"
    given = {each["name"]: each.get("value") for each in container.get("env", ())}
    assert int(given.get("JAX_NUM_PROCESSES") or spec["parallelism"]) == spec["parallelism"] * group["replicas"]


def test_a_pod_of_the_gpu_recipe_finds_its_place_without_asking_kubernetes():
    jobset, group, container = read(FOLDER / "jobset-gpu.yaml")
    annotations = {NAME: jobset["metadata"]["name"], NUMBER: "3"}
    variables = {"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "3"}
    for each in container["env"]:
        if "value" in each:
            value = each["value"]
            for name, known in variables.items():
                value = value.replace(f"$({name})", known)
        else:
            path = each["valueFrom"]["fieldRef"]["fieldPath"]
            value = annotations[path.removeprefix("metadata.annotations['").removesuffix("']")]
        variables[each["name"]] = value
    host = f"{jobset['metadata']['name']}-{group['name']}-0-0.{jobset['metadata']['name']}"
    assert place(variables) == Place(f"{host}:8476", 4, 3)


@pytest.mark.parametrize("file", JOBSETS, ids=lambda file: file.stem)
def test_the_words_of_a_pod_are_understood(file):
    _, _, container = read(file)
    verb, dashes, program, trains, *words = container["args"]
    assert (verb, dashes, program, trains) == ("supervise", "--", "deepseek-jax", "train")
    options = _options.parse(words, extra=train.EXTRA)
    assert options.workdir == supervise.workdir_of(words)
    grace_s = read(file)[1]["template"]["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert options.config.watch.stop_s < grace_s


@pytest.mark.parametrize("image", ["cpu", "cuda13", "tpu"])
def test_an_image_installs_extras_that_exist(image):
    import configparser

    setup = configparser.ConfigParser()
    setup.read(FOLDER.parent.parent / "setup.cfg")
    (line,) = [row for row in (FOLDER / f"{image}.Dockerfile").read_text().splitlines() if "pip install" in row]
    extras = line.partition(".[")[2].partition("]")[0].split(",")
    assert set(extras) <= set(setup["options.extras_require"])
    assert {"cpu": set(), "cuda13": {"gpu"}, "tpu": {"tpu"}}[image] == set(extras) & {"gpu", "tpu", "gpu12"}


@pytest.mark.parametrize(
    ("program", "pattern", "flags"),
    [
        ("hadolint", "*.Dockerfile", ()),
        ("shellcheck", "*.s[bh]*", ()),
        ("yamllint", "*.yaml", ("-s", "-d", "{extends: relaxed, rules: {line-length: {max: 120}}}")),
    ],
)
def test_a_linter_finds_nothing(program, pattern, flags):
    files = sorted(map(str, FOLDER.glob(pattern)))
    assert files
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed")
    found = subprocess.run([program, *flags, *files], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout + found.stderr


@pytest.mark.parametrize("script", ["slurm.sbatch", "tpu-vm.sh"])
def test_a_script_is_one_of_bash(script):
    subprocess.run(["bash", "-n", FOLDER / script], check=True)

"""The files for Slurm and Kubernetes: valid, and what they call is a command line of ours."""

import os
import re
import subprocess
from pathlib import Path

import kubernetes_validate
import pytest
import yaml

from preprocess.__main__ import command_line

EXAMPLES = Path(__file__).parents[1] / "examples"
SLURM = EXAMPLES / "slurm_array.sh"
KUBERAY = EXAMPLES / "kuberay_job.yaml"
KUBERNETES = EXAMPLES / "kubernetes_indexed_job.yaml"


@pytest.fixture
def called(tmp_path):
    """A function that runs a command with a `python` that only writes down its arguments."""
    stub = tmp_path / "python"
    stub.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > {tmp_path}/called\n')
    stub.chmod(0o755)

    def call(*command, **env):
        path = f"{tmp_path}:{os.environ['PATH']}"
        subprocess.run(command, env={"PATH": path, **env}, check=True)
        module, *arguments = (tmp_path / "called").read_text().splitlines()[1:]
        assert module == "preprocess"
        return command_line()[0].parse_args(arguments)

    return call


def test_the_slurm_array_builds_each_part_once(called):
    text = SLURM.read_text()
    first, last = map(int, re.search(r"^#SBATCH --array=(\d+)-(\d+)$", text, re.MULTILINE).groups())
    parts = int(re.search(r"^PARTS=(\d+)$", text, re.MULTILINE)[1])
    assert (first, last) == (0, parts - 1)
    for index in (first, last):
        env = {"SLURM_ARRAY_TASK_ID": str(index), "SLURM_CPUS_PER_TASK": "16"}
        options = called("bash", "-u", SLURM, **env)
        assert (options.verb, options.part) == ("shards", f"{index}/{parts}")
        assert options.workers == 16


def test_the_kubernetes_job_is_valid_and_builds_each_part_once(called):
    job = yaml.safe_load(KUBERNETES.read_text())
    kubernetes_validate.validate(job, kubernetes_validate.latest_version(), strict=True)
    (container,) = job["spec"]["template"]["spec"]["containers"]
    command = [*container["command"], *container["args"]]
    count = job["spec"]["completions"]
    assert job["spec"]["completionMode"] == "Indexed"
    for index in (0, count - 1):
        options = called(*command, JOB_COMPLETION_INDEX=str(index))
        assert (options.verb, options.part) == ("shards", f"{index}/{count}")
    # Parts share what all pods see.
    assert "://" in options.out
    assert "://" in options.cache


POD = {"spec": {...: ...}}
GROUP = {"rayStartParams": {...: str}, "template": POD}
RAY_JOB = {
    "apiVersion": str,
    "kind": str,
    "metadata": {"name": str},
    "spec": {
        "entrypoint": str,
        "submissionMode": ("K8sJobMode", "HTTPMode", "SidecarMode", "InteractiveMode"),
        "backoffLimit": int,
        "shutdownAfterJobFinishes": bool,
        "ttlSecondsAfterFinished": int,
        "rayClusterSpec": {
            "rayVersion": str,
            "headGroupSpec": GROUP,
            "workerGroupSpecs": [
                {"groupName": str, "replicas": int, "minReplicas": int, "maxReplicas": int} | GROUP
            ],
        },
    },
}
"""What of KubeRay's CRD (ray.io_rayjobs.yaml, version v1) the example uses; `...` is any name."""


def check_fields(found, want, where="job"):
    if want is ...:
        return
    if isinstance(want, dict):
        assert isinstance(found, dict), where
        for name, value in found.items():
            assert name in want or ... in want, f"{where}.{name}"
            check_fields(value, want.get(name, want.get(...)), f"{where}.{name}")
    elif isinstance(want, list):
        for each in found:
            check_fields(each, want[0], where)
    elif isinstance(want, tuple):
        assert found in want, where
    else:
        assert type(found) is want, where


def test_the_kuberay_job_has_the_fields_of_its_schema_and_builds_the_dataset():
    job = yaml.safe_load(KUBERAY.read_text())
    check_fields(job, RAY_JOB)
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    program, dash_m, module, *arguments = job["spec"]["entrypoint"].split()
    assert (program, dash_m, module) == ("python", "-m", "preprocess")
    options = command_line()[0].parse_args(arguments)
    assert (options.verb, options.engine, options.ray_address) == ("shards", "ray", "auto")
    assert "://" in options.out
    assert "://" in options.cache
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    assert len({g["template"]["spec"]["containers"][0]["image"] for g in groups}) == 1
    for group in groups:  # pods are those of Kubernetes
        pod = {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "pod"},
            **group["template"],
        }
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)

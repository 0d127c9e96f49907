"""The examples for clusters: scripts that a shell reads, manifests with what Kubernetes needs, and
commands whose flags there are."""

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from stillroom.cache.workers import WORLD_SIZE, find_worker
from stillroom.tools.flags import parse_with_file
from stillroom.tools.jobs import RolloutJob, ScoreJob

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
JOBS: dict[str, type[Any]] = {"score": ScoreJob, "rollout": RolloutJob}
SCRIPTS = ["slurm/score.sbatch", "slurm/rollout.sbatch", "ray/score.sh"]
SLURM = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MAX": "7"}
PATHS = {name: f"/shared/{name}" for name in ("ROOT", "TEACHER", "STUDENT", "PROMPTS")}


def settings_of(command: list[str]) -> Any:
    """The settings of a command, as its job gets them."""
    assert command[0] == "stillroom"
    return parse_with_file(JOBS[command[1]], command[2:], "stillroom")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_run_a_command_that_there_is(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A program in place of srun and stillroom says what it was called with."""
    for program in ("srun", "stillroom"):
        said = '"stillroom" "$@"' if program == "stillroom" else '"$@"'
        path = tmp_path / program
        path.write_text(f"#!/bin/sh\nprintf '%s\\n' {said}\n")
        path.chmod(0o755)
    script = EXAMPLES / name
    subprocess.run(["bash", "-n", script], check=True)
    env = {"PATH": f"{tmp_path}:{os.environ['PATH']}", **PATHS, **SLURM}
    ran = subprocess.run(
        ["bash", script], env=env, cwd=script.parent, capture_output=True, text=True, check=True
    )
    monkeypatch.chdir(script.parent)
    job = settings_of(ran.stdout.splitlines())
    assert job.root == "/shared/ROOT"
    if name == "slurm/score.sbatch":
        assert (job.rank, job.world_size, job.teacher.model) == (3, 8, "/shared/TEACHER")
    elif name == "slurm/rollout.sbatch":
        assert (job.rank, job.student) == (None, "/shared/STUDENT")
    else:
        assert (job.engine, job.ray.workers, job.ray.address) == ("ray", (1, 16), "auto")


@pytest.mark.parametrize("name", SCRIPTS[:2])
def test_batch_scripts_begin_with_what_slurm_reads(name: str) -> None:
    lines = (EXAMPLES / name).read_text().splitlines()
    assert lines[0] == "#!/bin/bash"
    directives = [line for line in lines if line.startswith("#SBATCH ")]
    assert lines[1 : 1 + len(directives)] == directives, "Slurm stops at the first command"
    assert {"--job-name", "--ntasks", "--time"} <= {d.split()[1].split("=")[0] for d in directives}


def load(name: str) -> Any:
    """A manifest."""
    (manifest,) = yaml.safe_load_all((EXAMPLES / "kubernetes" / name).read_text())
    return manifest


def container_of(manifest: Any) -> Any:
    """Its only container, once its pods are known to be whole."""
    pod = manifest["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container.keys() >= {"name", "image", "command", "args"}
    volumes = {volume["name"] for volume in pod["volumes"]}
    assert {mount["name"] for mount in container["volumeMounts"]} == volumes
    return container


def test_the_job_is_indexed_and_its_pods_know_how_many_they_are() -> None:
    manifest = load("score.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("batch/v1", "Job")
    assert manifest["metadata"]["name"]
    spec, container = manifest["spec"], container_of(manifest)
    assert spec["completionMode"] == "Indexed"
    assert spec["template"]["spec"]["restartPolicy"] == "Never", "as backoffLimitPerIndex needs"
    environ = {item["name"]: item["value"] for item in container["env"]}
    assert environ == {WORLD_SIZE: str(spec["completions"])}
    assert spec["parallelism"] == spec["completions"]
    job = settings_of([*container["command"], *container["args"]])
    assert job.root.startswith("s3://")
    last = environ | {"JOB_COMPLETION_INDEX": str(spec["completions"] - 1)}
    assert find_worker(job.rank, job.world_size, last).rank == spec["completions"] - 1


def test_the_service_watches() -> None:
    manifest = load("watch.yaml")
    assert (manifest["apiVersion"], manifest["kind"]) == ("apps/v1", "Deployment")
    labels = manifest["spec"]["template"]["metadata"]["labels"]
    assert manifest["spec"]["selector"]["matchLabels"] == labels
    container = container_of(manifest)
    assert settings_of([*container["command"], *container["args"]]).watch

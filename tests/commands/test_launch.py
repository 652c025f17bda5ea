"""The launch files: well-formed, linted where shellcheck is installed, and doing what their first lines say."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

LAUNCH = Path(__file__).parents[2] / "launch"
SCRIPTS = ["gpu.sh", "tpu.sh", "slurm.sbatch"]
SHELLCHECK = shutil.which("shellcheck", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_parse_and_are_clean(name):
    subprocess.run(["bash", "-n", LAUNCH / name], check=True)
    if SHELLCHECK is None:
        pytest.skip("shellcheck is not installed")
    found = subprocess.run([SHELLCHECK, LAUNCH / name], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("name", [*SCRIPTS, "k8s.yaml", "Dockerfile"])
def test_each_says_how_it_is_used_and_what_it_needs(name):
    text = (LAUNCH / name).read_text()
    head = "\n".join(line for line in text.splitlines()[:40] if line.startswith("#"))
    assert f"launch/{name}" in head
    assert "Needs" in head
    assert "ot yet" in head  # nothing here has run on such a machine


@pytest.mark.parametrize("name", SCRIPTS)
def test_each_prints_its_head_for_help_and_checks_nothing(name):
    bare = {"PATH": os.environ["PATH"]}  # neither a driver nor SLURM
    found = subprocess.run(["bash", LAUNCH / name, "--help"], capture_output=True, text=True, env=bare, timeout=20)
    assert (found.returncode, found.stderr) == (0, "")
    first, *_ = found.stdout.splitlines()
    assert first.startswith("Train ")
    assert f"launch/{name} --config" in found.stdout
    assert "SBATCH" not in found.stdout
    assert "set -e" not in found.stdout


def test_outside_slurm_it_says_how_it_is_submitted():
    bare = {"PATH": os.environ["PATH"]}
    found = subprocess.run(["bash", LAUNCH / "slurm.sbatch"], capture_output=True, text=True, env=bare, timeout=20)
    assert found.returncode == 2
    assert "sbatch launch/slurm.sbatch" in found.stderr


def on_path(folder, **programs):
    """An environment in which these shell programs are found first."""
    folder.mkdir()
    for name, text in programs.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    return {**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}


@pytest.mark.parametrize(
    ("after_signal", "requeued"), [("exit 1", True), ("exit 2", False), ("exit 0", False), (None, False)]
)
def test_slurm_saves_before_the_time_limit_and_queues_the_job_again(tmp_path, after_signal, requeued):
    """srun's place is taken by a program that ends as training does once SIGUSR1 has come."""
    srun = f"trap '{after_signal}' USR1; touch started; while true; do sleep 0.05; done" if after_signal else "exit 1"
    environment = on_path(tmp_path / "bin", srun=f'echo "$@" > arguments; {srun}', scontrol='echo "$@" > scontrol')
    environment |= {"SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "17"}
    job = subprocess.Popen(["bash", LAUNCH / "slurm.sbatch", "--workdir", "a b"], env=environment)
    if after_signal:
        deadline = time.monotonic() + 20
        while not (tmp_path / "started").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)  # the shell sets its trap meanwhile
        job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=20) == int((after_signal or "exit 1")[-1])
    assert (tmp_path / "arguments").read_text().endswith("-m sst_jax.train --stop-within 110 --workdir a b\n")
    assert (tmp_path / "scontrol").exists() == requeued
    if requeued:
        assert (tmp_path / "scontrol").read_text() == "requeue 17\n"


def test_slurms_notice_is_longer_than_the_deadline():
    text = (LAUNCH / "slurm.sbatch").read_text()
    notice, deadline = re.search(r"--signal=B:USR1@(\d+)", text), re.search(r"--stop-within (\d+)", text)
    assert int(notice[1]) > int(deadline[1])


@pytest.mark.parametrize("name", ["gpu.sh", "tpu.sh"])
def test_on_a_machine_without_the_card_they_say_so(name, tmp_path):
    if any(Path("/dev").glob("accel*")) or shutil.which("nvidia-smi"):
        pytest.skip("this machine has one")
    ended = subprocess.run(["bash", LAUNCH / name, "--workdir", str(tmp_path)], capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"launch/{name}: ")


def test_the_kubernetes_job_holds_together():
    claim, job = yaml.safe_load_all((LAUNCH / "k8s.yaml").read_text())
    assert (claim["kind"], job["kind"], job["apiVersion"]) == ("PersistentVolumeClaim", "Job", "batch/v1")
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["restartPolicy"] == "Never"  # what a podFailurePolicy asks for
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == claim["metadata"]["name"]
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    assert {rule["onExitCodes"]["containerName"] for rule in job["spec"]["podFailurePolicy"]["rules"]
            if "onExitCodes" in rule} == {container["name"]}  # fmt: skip
    arguments = dict(argument.removeprefix("--").split("=", 1) for argument in container["args"])
    assert int(arguments["stop-within"]) < pod["terminationGracePeriodSeconds"]
    mounts = [mount["mountPath"] for mount in container["volumeMounts"]]
    assert any(arguments["workdir"].startswith(f"{mount}/") for mount in mounts)
    image = (LAUNCH / "Dockerfile").read_text()
    assert f"USER {pod['securityContext']['runAsUser']}\n" in image
    assert container["image"] in image


def test_the_image_copies_what_exists_and_runs_as_nobody_special():
    text = (LAUNCH / "Dockerfile").read_text()
    for line in re.findall(r"^COPY (.+) \S+$", text, re.MULTILINE):
        for name in line.split():
            assert (LAUNCH.parent / name).exists(), name
    assert re.search(r"^USER 1000$", text, re.MULTILINE)
    assert 'ENTRYPOINT ["python", "-m", "sst_jax.train"]' in text  # no shell, or signals would end there

"""Training on several devices and in several processes: the numbers of one, and on from each to the other."""

import os
import re
import shutil
import socket
import subprocess
import sys

import numpy as np
import pytest

from sst_jax.training.distributed import in_cluster
from sst_jax.weights.checkpoint import read_metrics
from tests.support import ROOT
from tests.support.runs import SMALL, TINY, train_small

FOUR = ["--config.data.batch_size=4"]


def start(workdir, *more, devices=1):
    """A training process with so many devices."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "sst_jax.train", "--config", TINY, *SMALL, *FOUR, "--workdir", str(workdir), *more]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def together(workdir, *more, processes=2, devices=1):
    """What the processes of one run print, each on devices of its own."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = [f"--config.mesh.coordinator=127.0.0.1:{port}", f"--config.mesh.processes={processes}"]
    running = [
        start(workdir, *group, f"--config.mesh.process={number}", *more, devices=devices) for number in range(processes)
    ]
    said = [process.communicate(timeout=500) for process in running]
    for process, (_, errors) in zip(running, said, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in said]


def assert_same_losses(run, reference):
    lines, expected = read_metrics(run), read_metrics(reference)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in ("loss", "heldout_loss", "gradient_norm", "answer_tokens", "alpha_mean"):
            assert (name in line) == (name in other)
            if name in line:
                np.testing.assert_allclose(line[name], other[name], rtol=1e-5, err_msg=f"{name}, step {line['step']}")


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """The run that one process makes on one device."""
    workdir = tmp_path_factory.mktemp("alone") / "run"
    assert train_small(workdir, *FOUR) == 0
    return workdir


@pytest.mark.slow
def test_two_processes_make_the_run_of_one_and_one_of_them_speaks(tmp_path, alone):
    first, second = together(tmp_path / "run")
    assert_same_losses(tmp_path / "run", alone)
    assert "held-out loss" in first
    assert "step" not in second  # Gloo itself says that it is connected
    assert (tmp_path / "run" / "result.json").is_file()


@pytest.mark.slow
def test_a_run_goes_on_from_eight_devices_to_one_and_to_two_processes(tmp_path, alone):
    """Steps 1 and 2 on 8 devices, 3 on one, 4 in two processes of two devices: the losses of one device throughout."""
    eight = tmp_path / "run"
    process = start(eight, "--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", devices=8)
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    assert_same_losses(eight, alone)
    forget_after(eight, 2)
    assert train_small(eight, *FOUR) == 0
    assert_same_losses(eight, alone)
    forget_after(eight, 3)
    together(eight, devices=2)
    assert_same_losses(eight, alone)


def forget_after(run, step):
    for later in range(step + 1, 5):
        shutil.rmtree(run / "checkpoints" / str(later))
        (run / "manifests" / f"{later}.json").unlink()


@pytest.mark.slow
def test_a_batch_that_the_mesh_does_not_divide_is_refused_before_anything_is_read(tmp_path):
    process = start(tmp_path / "run", "--config.data.batch_size=3", "--config.model.source=nowhere", devices=2)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 2
    assert re.search("data.batch_size=3 .* mesh.data x mesh.fsdp = 2", errors.strip().splitlines()[-1])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "8"}, False),  # inside salloc, but not in a step of srun
        ({"SLURM_JOB_ID": "7", "SLURM_STEP_NUM_TASKS": "8"}, True),
        ({"SLURM_STEP_NUM_TASKS": "1"}, False),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, True),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, False),
        ({"KUBERNETES_SERVICE_HOST": "10.0.0.1", "JOB_COMPLETION_INDEX": "0"}, True),
    ],
)
def test_a_cluster_is_recognised(environment, several):
    assert in_cluster(environment) is several

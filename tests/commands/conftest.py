"""One finished tiny run that many tests look at."""

import pathlib
import shutil

import pytest

from tests.support.runs import train_small


@pytest.fixture(scope="session")
def finished(tmp_path_factory):
    """A run of four steps with a checkpoint after each. Not to be written in."""
    workdir = tmp_path_factory.mktemp("runs") / "finished"
    assert train_small(workdir) == 0
    return workdir


@pytest.fixture
def copied(finished, tmp_path):
    """A private copy of `finished`."""
    return pathlib.Path(shutil.copytree(finished, tmp_path / "run"))

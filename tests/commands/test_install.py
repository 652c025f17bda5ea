"""A built wheel in an environment of its own: commands and recipes without a checkout."""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig

import pytest

ROOT = pathlib.Path(__file__).parents[2]
SOURCES = ("sst_jax", "configs", "pyproject.toml", "setup.py", "README.md", "LICENSE")
FEW = [
    "--config.train.steps=2", "--config.train.eval_every=2", "--config.data.limit=24", "--config.data.heldout=2",
    "--config.data.batch_size=2", "--config.train.sample_tokens=3",
]  # fmt: skip
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
OFFLINE = ["--no-deps", "--no-index", "--no-build-isolation"]


def new_environment(folder: pathlib.Path) -> pathlib.Path:
    """A fresh virtual environment that sees the dependencies of this one, but not this checkout; its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    (site,) = folder.glob("lib/python*/site-packages")
    # A folder in a .pth file is searched, while .pth files in that folder, such as an editable install's, are not read.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "bin"


def call(folder: pathlib.Path, *command: str | pathlib.Path) -> str:
    """What a program prints in a folder, with nothing of this checkout on its path."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ended = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr[-3000:]
    return ended.stdout


@pytest.fixture(scope="module", params=["wheel", "editable"])
def installed(request, tmp_path_factory):
    """The bin folder of an environment with the package, from a wheel whose sources are gone or from a checkout."""
    pytest.importorskip("setuptools")
    root = tmp_path_factory.mktemp(request.param)
    sources = root / "checkout"
    sources.mkdir()
    for name in SOURCES:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, sources / name)
    programs = new_environment(root / "environment")
    install = [*PIP, "--python", str(programs / "python"), "install", *OFFLINE]
    if request.param == "wheel":
        call(root, *PIP, "wheel", *OFFLINE, "--wheel-dir", str(root), str(sources))
        (wheel,) = root.glob("*.whl")
        call(root, *install, str(wheel))
        shutil.rmtree(sources)
    else:
        call(root, *install, "--editable", str(sources))
    return programs


@pytest.mark.slow
def test_an_installed_package_trains_from_an_empty_folder(installed, tmp_path):
    printed = call(tmp_path, installed / "sst-jax", "train", "--config", "tiny", *FEW)
    assert "next:" in printed
    assert [entry.name for entry in tmp_path.iterdir()] == ["runs"]
    assert json.loads((tmp_path / "runs" / "tiny" / "result.json").read_text())["steps"] == 2


@pytest.mark.slow
def test_an_installed_package_finds_its_recipes_and_data_files(installed, tmp_path):
    assert call(tmp_path, installed / "sst-jax", "--version").startswith("sst-jax ")
    program = """if True:
        import importlib.metadata, pathlib, sst_jax
        from sst_jax.training import read_recipe
        from sst_jax.training.recipe import recipe_names
        assert importlib.metadata.version("sst-jax") == sst_jax.__version__
        package = pathlib.Path(sst_jax.__file__).parent
        assert (package / "py.typed").is_file()
        assert (package / "weights" / "torch_sst" / "modeling_sst.py").is_file()
        assert set(recipe_names()) >= {"baseline", "quickstart", "sst", "statetrack", "tiny"}
        for name in ("sst:size=1b", "configs/sst.py:size=1b", "baseline:size=1b", "configs/quickstart.py"):
            read_recipe(name)
        print(sst_jax.__file__)
    """
    where = pathlib.Path(call(tmp_path, installed / "python", "-c", program).strip())
    assert not where.is_relative_to(ROOT)

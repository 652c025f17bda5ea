"""Files that repeat what pyproject.toml says agree with it: workflow, hooks, citation; and test.sh tells its usage."""

import re
import subprocess
import tomllib

import pytest
import yaml

import sst_jax
from tests.support import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
OLDEST = re.fullmatch(r">=(3\.\d+)", PROJECT["project"]["requires-python"])[1]


@pytest.fixture(scope="module")
def job():
    workflow = yaml.safe_load((ROOT / ".github/workflows/tests.yml").read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML 1.1 reads the key `on` as a truth value
    (job,) = workflow["jobs"].values()
    return job


def test_the_workflow_runs_on_the_oldest_python_and_on_others_that_are_declared(job):
    versions = [entry["python"] for entry in job["strategy"]["matrix"]["include"]]
    assert min(versions, key=lambda version: int(version.split(".")[1])) == OLDEST
    classifiers = PROJECT["project"]["classifiers"]
    assert all(f"Programming Language :: Python :: {version}" in classifiers for version in versions)


def test_the_workflow_installs_extras_that_exist_and_torch_on_the_oldest_python_alone(job):
    for entry in job["strategy"]["matrix"]["include"]:
        extras = entry["extras"].split(",")
        assert set(extras) <= PROJECT["project"]["optional-dependencies"].keys()
        assert ("torch" in extras) == (entry["python"] == OLDEST)


def test_the_tools_aim_at_the_oldest_python():
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{OLDEST.replace('.', '')}"
    assert PROJECT["tool"]["mypy"]["python_version"] == OLDEST


def test_no_module_of_the_package_escapes_the_type_checker():
    for override in PROJECT["tool"]["mypy"]["overrides"]:
        assert not any(module.startswith(("sst_jax", "*")) for module in override["module"])
        assert override.keys() == {"module", "ignore_missing_imports"}


def test_workflow_hooks_and_test_sh_check_the_same(job):
    steps = "\n".join(step.get("run", "") for step in job["steps"])
    script = (ROOT / "test.sh").read_text()
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == ["ruff check", "ruff format --check", "mypy"]
    for hook in hooks:
        assert re.search(rf"^{hook['entry']}( \.)?$", steps, re.M)
        assert f".venv-test/bin/{hook['entry']}" in script
        assert hook["entry"].split()[0] in " ".join(PROJECT["project"]["optional-dependencies"]["dev"])


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == sst_jax.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert citation["references"][0]["url"] == PROJECT["project"]["urls"]["Paper"]


def test_help_of_the_test_script_says_how_and_does_nothing(tmp_path):
    copy = tmp_path / "test.sh"
    copy.write_bytes((ROOT / "test.sh").read_bytes())
    copy.chmod(0o755)
    for flag in ("--help", "-h"):
        done = subprocess.run([copy, flag], capture_output=True, text=True, timeout=20)
        assert done.returncode == 0
        assert "usage: ./test.sh [--all]" in done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["test.sh"]

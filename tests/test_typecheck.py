"""`--typecheck` is live: with it the package's annotations are checked, and a wrong shape is an error that names it."""

import ast
import subprocess
import sys

import jax.numpy as jnp
import pytest

from tests.support import ROOT

WRONG = """
import jax.numpy as jnp, pytest
from sst_jax.model import decoder

def test_wrong():
    with pytest.raises(Exception, match="document_positions") as error:
        decoder.document_positions(jnp.ones(3, int))
    assert type(error.value).__name__ == "TypeCheckError"
    assert decoder.document_positions(jnp.ones((1, 3), int)).tolist() == [[0, 1, 2]]
"""


@pytest.mark.slow
def test_a_wrong_shape_is_refused_under_the_option(tmp_path):
    """In a session of its own with a worker, which learns of the option in another way than the session itself."""
    file = tmp_path / "test_wrong.py"
    file.write_text(WRONG)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-c", str(ROOT / "pyproject.toml")]
    command += ["--rootdir", str(ROOT), "-p", "tests.conftest", str(file)]
    checked = subprocess.run([*command, "-n", "1", "--typecheck"], cwd=ROOT, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


def test_this_session_is_checked_where_it_was_asked(request):
    from sst_jax.model import decoder

    assert hasattr(decoder.document_positions, "__wrapped__") == request.config.getoption("typecheck")
    assert decoder.document_positions(jnp.ones((2, 3), int)).shape == (2, 3)


def test_every_protocol_can_be_checked_at_run_time():
    """Or the module that names it in a signature cannot be imported under --typecheck."""
    protocols = {
        f"{file.name}: {node.name}": [ast.unparse(decorator) for decorator in node.decorator_list]
        for file in (ROOT / "sst_jax").rglob("*.py")
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef) and any(ast.unparse(base).startswith("Protocol") for base in node.bases)
    }
    assert len(protocols) >= 5
    assert {name for name, decorators in protocols.items() if "runtime_checkable" not in decorators} == set()

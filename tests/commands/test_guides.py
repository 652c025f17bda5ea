"""The guides for users: the commands of a page run, one after another, and print what it says."""

import os
import re
import subprocess
import sys

import pytest

from tests.support import ROOT

GUIDES = ("your-own-data.md", "your-own-model.md", "your-own-task.md")


@pytest.mark.slow
@pytest.mark.parametrize("guide", GUIDES)
def test_the_commands_of_a_guide_run_and_print_what_it_says(guide, tmp_path):
    page = (ROOT / "docs" / guide).read_text(encoding="utf-8")
    blocks = re.findall(r"^```bash\n(.*?)^```", page, flags=re.M | re.S)
    assert len(blocks) >= 3
    (tmp_path / "sst-jax").write_text(f'#!/bin/sh\nexec "{sys.executable}" -m sst_jax "$@"\n')
    (tmp_path / "sst-jax").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    said = ""
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euc", block], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
        )
        assert done.returncode == 0, f"{block}\n{done.stderr}"
        said += done.stdout
    for shown in re.findall(r"^```text\n(.*?)^```", page, flags=re.M | re.S):
        assert shown in said, said

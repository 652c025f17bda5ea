"""Who may import whom: library below, laboratory above, commands on top, and no circles."""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# The one table. A package imports those before it in the list, never one behind it; imports inside functions and under
# TYPE_CHECKING count as others do. "commands" are the files directly in sst_jax/, and the package itself.
ORDER = (
    "errors", "types", "files", "console",
    "model", "families", "data", "weights", "inference", "training", "serving",
    "lab.statistics", "lab.planning", "lab.evaluation", "lab.analysis", "lab.probing", "lab.studies",
    "commands",
)  # fmt: skip


def modules(root):
    """By dotted name, the files of the package; those that exports carry away import nothing of it."""
    files = sorted(file for file in (root / "sst_jax").rglob("*.py") if file.parent.name != "torch_sst")
    return {".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__"): file for file in files}


def imports(known, file):
    """(line, module of the package) for every import of one, wherever it stands in the file."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}, line {node.lineno}: a relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            if name.split(".")[0] == "sst_jax":
                yield node.lineno, name if name in known else name.rpartition(".")[0]


def package(module):
    """The entry of ORDER that a module belongs to."""
    _, *parts = module.split(".")
    for size in (2, 1):
        if ".".join(parts[:size]) in ORDER:
            return ".".join(parts[:size])
    return "commands"


def upward(root):
    known = modules(root)
    return [
        f"{file.relative_to(root)}, line {line}: {package(name)} imports {target}, which stands above it"
        for name, file in known.items()
        for line, target in imports(known, file)
        if ORDER.index(package(target)) > ORDER.index(package(name))
    ]


def circle(root):
    """The modules of an import circle, or [] where there is none."""
    known = modules(root)
    graph = {name: {target for _, target in imports(known, file)} - {name} for name, file in known.items()}
    try:
        graphlib.TopologicalSorter(graph).prepare()
    except graphlib.CycleError as error:
        return error.args[1]
    return []


def test_no_package_imports_one_above_it():
    assert upward(ROOT) == []


def test_no_modules_import_each_other_in_a_circle():
    assert circle(ROOT) == []


def test_every_package_has_its_place_in_the_order():
    there = {path.name for path in (ROOT / "sst_jax").iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert there == {name.split(".")[0] for name in ORDER if (ROOT / "sst_jax" / name.split(".")[0]).is_dir()}
    laboratory = {path.stem for path in (ROOT / "sst_jax" / "lab").iterdir() if path.stem[0] not in "._"}
    assert laboratory == {name.split(".")[1] for name in ORDER if name.startswith("lab.")}


@pytest.mark.parametrize(
    "text",
    [
        "from sst_jax.lab import statistics",
        "def f():\n    import sst_jax.lab.statistics",
        "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from sst_jax.lab.statistics import wilson",
        "from sst_jax import evaluate",
    ],
)
def test_an_arrow_upward_is_seen_wherever_it_hides(text, tmp_path):
    for name in ("lab/statistics.py", "evaluate.py"):
        (tmp_path / "sst_jax" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "sst_jax" / name).write_text("")
    (tmp_path / "sst_jax" / "model").mkdir()
    (tmp_path / "sst_jax" / "model" / "state.py").write_text(text)
    (found,) = upward(tmp_path)
    assert found.startswith("sst_jax/model/state.py, line ")
    assert circle(tmp_path) == []
    (tmp_path / "sst_jax" / "lab" / "statistics.py").write_text("from sst_jax.model.state import x")
    (tmp_path / "sst_jax" / "evaluate.py").write_text("from sst_jax.model import state")
    assert "sst_jax.model.state" in circle(tmp_path)

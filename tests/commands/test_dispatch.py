"""`sst-jax COMMAND` and `python -m sst_jax COMMAND`: the commands by another name, and the names of the package."""

import ast
import pathlib
import subprocess
import sys

import pytest

import sst_jax
from sst_jax import __main__ as dispatcher
from sst_jax.console.command import Parser

PACKAGE = pathlib.Path(sst_jax.__file__).parent


@pytest.fixture(autouse=True)
def spelling(monkeypatch):
    """What a command run from here on calls itself is forgotten after the test."""
    monkeypatch.setattr(Parser, "program", Parser.program)


def defines_main(file):
    return any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in ast.parse(file.read_text()).body)


def test_every_file_with_a_main_is_a_command():
    files = {file.stem for file in PACKAGE.glob("*.py") if file.stem != "__main__" and defines_main(file)}
    assert set(dispatcher.COMMANDS) == files


@pytest.mark.parametrize("name", dispatcher.COMMANDS)
def test_a_command_calls_itself_as_it_was_called(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/somewhere/bin/sst-jax"])
    assert dispatcher.main([name, "--help"]) == 0
    assert capsys.readouterr().out.startswith(f"usage: sst-jax {name} ")
    command = [sys.executable, "-m", f"sst_jax.{name}", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert shown.startswith(f"usage: python -m sst_jax.{name} ")


def test_no_command_imports_jax_before_it_runs():
    """--help of any of them answers at once: seconds go into importing JAX."""
    lines = [f"import sst_jax.{name}" for name in dispatcher.COMMANDS]
    lines.append("import sys; print(*{'jax', 'numpy', 'transformers', 'orbax'} & set(sys.modules))")
    shown = subprocess.run([sys.executable, "-c", "\n".join(lines)], capture_output=True, text=True, check=True).stdout
    assert shown.split() == []


def test_the_list_of_commands_says_what_each_does(capsys):
    assert dispatcher.main(["--help"]) == 0
    shown = capsys.readouterr().out
    for name in dispatcher.COMMANDS:
        (line,) = [line for line in shown.splitlines() if line.startswith(f"  {name} ")]
        assert len(line) > 30, line


def test_the_version_is_the_packages(capsys):
    assert dispatcher.main(["--version"]) == 0
    assert capsys.readouterr().out == f"sst-jax {sst_jax.__version__}\n"


def test_every_command_knows_the_version(capsys):
    assert dispatcher.main(["train", "--version"]) == 0
    assert capsys.readouterr().out == f"sst-jax {sst_jax.__version__}\n"


def test_bash_completes_commands_flags_and_files(tmp_path, capsys):
    assert dispatcher.main(["--completion"]) == 0
    script = capsys.readouterr().out
    (tmp_path / "talks.jsonl").touch()
    (tmp_path / "sst-jax").write_text(f'#!/bin/sh\nexec {sys.executable} -m sst_jax "$@"\n')
    (tmp_path / "sst-jax").chmod(0o755)

    def completed(*words):
        asked = (
            f"COMP_WORDS=({' '.join(map(repr, words))}); COMP_CWORD={len(words) - 1}; _sst_jax; echo ${{COMPREPLY[@]}}"
        )
        environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "PYTHONPATH": str(PACKAGE.parent)}
        found = subprocess.run(
            ["bash", "-c", f"{script}\n{asked}"],
            capture_output=True,
            text=True,
            check=True,
            cwd=tmp_path,
            env=environment,
        )
        return found.stdout.split()

    assert completed("sst-jax", "ev") == ["evaluate"]
    assert completed("sst-jax", "serve", "--no-req") == ["--no-request-log"]
    assert completed("sst-jax", "train", "tal") == ["talks.jsonl"]


@pytest.mark.parametrize(
    ("argv", "culprit"),
    [
        (["trian"], "there is no command 'trian'; commands are train, recipe, dataset, generate"),
        ([], "a command is missing"),
        (["train"], "--config"),
        (["train", "--config", "nothing"], "the recipes that come with sst_jax are"),
    ],
)
def test_bad_input_ends_with_2_and_one_line(argv, culprit, capsys):
    assert dispatcher.main(argv) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    assert culprit in message


@pytest.mark.parametrize("argv", [["--help"], ["--version"], ["train", "--help"], ["plan", "--help"]])
def test_help_imports_no_jax_or_numpy(argv):
    program = (
        "import sys; from sst_jax.__main__ import main; assert main(sys.argv[1:]) == 0; "
        "assert not {'jax', 'numpy', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, *argv], check=True, capture_output=True)


def test_the_package_offers_its_names():
    assert set(sst_jax.__all__) | {"__version__"} <= set(dir(sst_jax))
    for name in sst_jax.__all__:
        assert getattr(sst_jax, name) is not None
    with pytest.raises(AttributeError, match="lode"):
        _ = sst_jax.lode

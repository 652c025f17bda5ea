"""Paths as people write them, "~" behind "=" too, and disks that take no more: one line each."""

import contextlib
import json
import resource
import threading
import time

import jax
import pytest

import sst_jax
from sst_jax import analyze, convert, evaluate, export, generate, serve, train
from sst_jax.console.command import PATHS, Parser
from sst_jax.console.command import run as run_command
from sst_jax.errors import RunInterrupted
from sst_jax.files import disk_error, staged_folder, writing
from sst_jax.inference import halting_probe
from sst_jax.training import read_recipe
from sst_jax.training.problems import split_problems
from sst_jax.training.recipe import find_file
from tests.support.runs import train_small


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder, and another one to work in."""
    (tmp_path / "home").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "here")
    yield tmp_path / "home"
    assert not (tmp_path / "here" / "~").exists()


@pytest.mark.parametrize(
    ("command", "flags"),
    [
        (analyze, {"--model", "--base", "--prompts", "--out", "--data", "--json"}),
        (convert, {"--from", "--to", "--base", "--calibrate", "--json"}),
        (evaluate, {"--model", "--base", "--out", "--data", "--json"}),
        (export, {"--from", "--to", "--base", "--json"}),
        (generate, {"--model", "--base", "--prompts", "--halt", "--out", "--json"}),
        (serve, {"--model", "--base"}),
        (train, {"--config", "--workdir", "--base", "--json"}),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_arguments_that_are_paths_are_among_those_that_are_expanded(command, flags):
    actions = command.parser()._actions
    assert flags <= {flag for action in actions if action.metavar in PATHS for flag in action.option_strings}


def test_a_tilde_is_the_home_folder_in_flags_and_lists(home):
    parser = Parser()
    parser.add_argument("--to", metavar="DIR")
    parser.add_argument("--prompt", metavar="TEXT")
    parser.add_argument("--several", metavar="FILE", nargs="+")
    found = parser.parse_args(["--to=~/x", "--prompt=~/x", "--several", "~/a", "b"])
    assert (found.to, found.prompt, found.several) == (f"{home}/x", "~/x", [f"{home}/a", "b"])


def test_a_tilde_is_the_home_folder_for_commands_and_calls(home):
    assert run_command(convert.main, ["--from=random:tiny", "--to=~/base", "--json=~/out/summary.json"]) == 0
    assert (home / "out" / "summary.json").is_file()
    assert run_command(export.main, ["--from=~/base", "--to=~/merged", "--format=merged", "--no-measure-gap"]) == 0
    sst_jax.load("~/merged").save("~/saved")
    assert sorted(entry.name for entry in home.iterdir()) == ["base", "merged", "out", "saved"]
    with pytest.raises(sst_jax.InputError, match=rf"probe ~/nothing cannot be read: .*{home}/nothing"):
        halting_probe.load("~/nothing")


def test_a_tilde_is_the_home_folder_in_recipes(home):
    (home / "gsm8k").mkdir()
    rows = [{"question": f"What is {n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(20)]
    (home / "gsm8k" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = read_recipe("tiny", {"data.name": "gsm8k", "data.path": "~/gsm8k", "data.heldout": 2})
    split = split_problems(recipe.data, 0)
    assert (len(split.training[0]), len(split.heldout)) == (18, 2)
    (home / "mine.py").write_text("from sst_jax.training.recipe import defaults as get_config")
    assert find_file("~/mine.py") == home / "mine.py"


# ---------------------------------------------------------------------------------------------------------- full disks


@contextlib.contextmanager
def no_file_beyond(size):
    """A disk that takes no file beyond `size` bytes: real errors of every library that writes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    kept = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1e9)  # or the cache would keep half a program
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", kept)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """The tiny model as a base folder, and as a Hugging Face folder."""
    folder = tmp_path_factory.mktemp("full")
    sst_jax.load("random:tiny", "float32").save(folder / "base")
    arguments = ["--from", str(folder / "base"), "--to", str(folder / "merged"), "--format", "merged"]
    assert run_command(export.main, [*arguments, "--no-measure-gap"]) == 0
    return folder


def one_line(errors, *parts):
    """Whether what a command wrote to stderr ends with one line that has these parts.

    Of what comes before, TensorStore's threads may say on their own that nobody waits for them any more.
    """
    last = errors.strip().splitlines()[-1]
    assert "RESOURCE_EXHAUSTED" not in errors
    assert len(last) < 300
    assert all(part in last for part in parts), last
    assert "File too large" in last or "No space left on device" in last, last  # NumPy's short writes do not say which


@pytest.mark.parametrize("given", ["base", "merged"])
def test_a_full_disk_ends_convert_in_one_line(source, tmp_path, capsys, given):
    target = tmp_path / "out"
    command = ["--from", str(source / given), "--to", str(target)]
    with no_file_beyond(20_000):
        assert run_command(convert.main, command) == 1
    one_line(capsys.readouterr().err, f"{target} cannot be written")
    assert not target.exists()
    assert run_command(convert.main, command) == 0  # there is room now
    assert [entry.name for entry in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_ends_export_in_one_line_and_leaves_nothing(source, tmp_path, capsys):
    command = ["--from", str(source / "base"), "--to", str(tmp_path / "out"), "--format", "merged", "--no-measure-gap"]
    with no_file_beyond(20_000):
        assert run_command(export.main, command) == 1
    one_line(capsys.readouterr().err, f"{tmp_path / 'out'} cannot be written", "nothing is left of it")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_ends_generate_in_one_line(source, tmp_path, capsys):
    asked = ["--model", str(source / "base"), "--prompt", "hi", "--max-new-tokens", "1"]
    with no_file_beyond(0):
        assert run_command(generate.main, [*asked, "--json", str(tmp_path / "out.json")]) == 1
    assert "Traceback" not in capsys.readouterr().err


def test_a_workdir_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train_small(tmp_path / "file" / "run") == 2
    assert (
        f"error: --workdir {tmp_path / 'file' / 'run'} cannot be written to: Not a directory" in capsys.readouterr().err
    )
    assert run_command(convert.main, ["--from", "random:tiny", "--to", str(tmp_path / "file" / "base")]) == 2
    assert "Not a directory" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (OSError(30, "Read-only file system"), "Read-only file system"),
        (OSError("1024 requested and 0 written"), "No space left on device"),
        (ValueError('{"driver": "zarr"}: Error writing "x" [OS error 28: ENOSPC No space left on device]'),
         "No space left on device"),
        (OSError(2, "No such file or directory"), None),
        (ValueError("shape mismatch"), None),
    ],
)  # fmt: skip
def test_what_a_disk_says_is_told_from_other_errors(tmp_path, error, reason):
    assert disk_error(error) == reason
    with pytest.raises(RunInterrupted if reason else type(error), match=reason), writing(tmp_path, "make room"):
        raise error
    with pytest.raises(Exception), staged_folder(tmp_path / "new"):  # noqa: B017, PT011 - as above
        raise error
    assert not list(tmp_path.iterdir())


def test_a_folder_that_failed_stays_away_though_threads_still_write_into_it(tmp_path):
    def write_on(folder):
        until = time.monotonic() + 0.1
        while time.monotonic() < until:
            with contextlib.suppress(FileNotFoundError):  # removed between the two
                folder.mkdir(exist_ok=True)
                (folder / "late").touch()

    def fail(folder):
        threads.append(threading.Thread(target=write_on, args=(folder,)))
        threads[0].start()
        raise OSError("full")

    threads = []
    with pytest.raises(OSError, match="full"), staged_folder(tmp_path / "new") as folder:
        fail(folder)
    threads[0].join()
    assert not list(tmp_path.iterdir())


def test_a_name_that_is_too_long_is_one_line(tmp_path, capsys):
    def main(argv):
        (tmp_path / argv[0]).stat()

    assert run_command(main, ["x" * 300]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: /")
    assert error.endswith("...: File name too long\n")

"""Start and end of every command: parsing, exit codes, JSON beside the printed text.

Exit codes: 0 success, 2 bad input (one line on standard error that names the culprit), 1 anything else.
"""

from __future__ import annotations

import argparse
import errno
import itertools
import json
import os
import pathlib
import shlex
import shutil
import sys
import tempfile
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, TypedDict, TypeVar

from sst_jax.console import compile_cache
from sst_jax.console.version import VERSION
from sst_jax.errors import InputError, RunInterrupted

if TYPE_CHECKING:
    from sst_jax.types import JsonValue
else:  # it comes with JAX, which --help does not wait for
    JsonValue = object

Number = TypeVar("Number", int, float)

# Metavars of arguments that are paths, or may be: "~" is expanded in them, also behind "=", where no shell does it.
PATHS = ("DIR", "FILE", "MODEL", "PROBE", "OUT_A", "OUT_B")
MODULES = "python -m sst_jax."  # what begins the `prog` of every command's parser


class Parser(argparse.ArgumentParser):
    """argparse with readable help, whose errors are `InputError`s.

    program         how commands are called: `sst-jax` sets it where it runs one, so that their help says what was typed
    keeps_programs  whether what a command compiles is kept; programs for hardware that is not here cannot be
    """

    program = MODULES
    keeps_programs = True

    def __init__(self, prog: str | None = None, **kwargs: Any):  # argparse's own, which its subparsers pass on
        kwargs.setdefault("formatter_class", argparse.RawDescriptionHelpFormatter)
        if prog is not None and prog.startswith(MODULES):
            prog = self.program + prog.removeprefix(MODULES)
        super().__init__(prog, allow_abbrev=False, **kwargs)
        if prog is not None:  # not of a command's parts
            self.add_argument("--version", action="version", version=f"sst-jax {VERSION}")
        self.add_argument(
            "--no-compile-cache",
            action="store_true",
            default=argparse.SUPPRESS,  # or a subparser's default would hide the flag before it
            help=f"neither read nor keep compiled programs (in ~/.cache/sst_jax, or {compile_cache.VARIABLE})",
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message} (see {self.prog} --help)")

    def parse_args(self, argv: Sequence[str] | None = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse as argparse does.

        Raises: InputError on bad arguments, or where the file of --json, which is written last, could not be written.
        """
        found = super().parse_args(argv)
        if getattr(found, "no_compile_cache", False):
            compile_cache.keep_none()
        elif self.keeps_programs:
            compile_cache.keep_programs()
        if file := getattr(found, "json", None):
            if pathlib.Path(file).is_dir():
                raise InputError(f"--json {file} is a folder: give the name of a file")
            folder_for("--json", pathlib.Path(file).parent)
        return found

    def parse_known_args(self, args=None, namespace=None):
        """Parse as argparse does, with "~" expanded in paths."""
        found, rest = super().parse_known_args(args, namespace)
        for action in self._actions:
            value = getattr(found, action.dest, None)
            if action.metavar in PATHS and isinstance(value, str):
                setattr(found, action.dest, os.path.expanduser(value))
            elif action.metavar in PATHS and isinstance(value, list):
                setattr(found, action.dest, [os.path.expanduser(part) for part in value])
        return found, rest

    def takes_model(
        self, help: str = "folder, hub id (owner/name or owner/name@revision), GGUF file or training run"
    ) -> None:
        """Add the flags for the model, its chat template, and another place of its base; `opening` reads the latter."""
        self.add_argument("--model", required=True, metavar="MODEL", help=help)
        self.takes_template()
        self.takes_base()

    def takes_template(self) -> None:
        """Add the flag for another chat template than the model's own."""
        self.add_argument(
            "--chat-template", metavar="FILE", help="a Jinja template for chats (default: the one that the model has)"
        )

    def takes_base(self) -> None:
        """Add the flag for another place of the base that a run or an adapter records."""
        self.add_argument(
            "--base",
            metavar="MODEL",
            help="open a run or an adapter on this folder, file or hub id, where its base lies now; the digest must be "
            "the recorded one",
        )

    def takes_overrides(self, example: str = "--config.train.steps=200") -> None:
        """Add the knobs of a recipe, which `parse_with_overrides` takes apart from the flags, to the help."""
        self.add_argument("--config.KEY=VALUE", action="store_true", help=f"override a knob of the recipe: {example}")

    def parse_with_overrides(self, argv: Sequence[str]) -> tuple[argparse.Namespace, list[str]]:
        """Return the flags, and the --config.KEY=VALUE arguments.

        Raises: InputError as `parse_args`, and on a knob whose value stands apart.
        """
        # Overrides are taken out first, so that neither is mistaken for the other.
        overrides = [argument for argument in argv if argument.startswith("--config.")]
        for argument, following in itertools.pairwise(argv):
            if argument in overrides and "=" not in argument and not following.startswith("-"):
                raise InputError(f"write {argument}={following}, without a space")
        return self.parse_args([argument for argument in argv if argument not in overrides]), overrides


class Opening(TypedDict):
    """How `sst_jax.load` opens a model, beside its name and type."""

    base: str | None
    chat_template: str | None


def opening(args: argparse.Namespace) -> Opening:
    """Return what the flags of `Parser.takes_model` say beside --model."""
    return {"base": args.base, "chat_template": args.chat_template}


def called(name: str) -> str:
    """Return how a command is called, so that it runs where it is pasted: as this one was, with this Python.

    The environment that this ran in need not be the one of the shell: `sst-jax` goes by its path unless it is found.
    """
    if Parser.program.startswith("python "):
        return f"{shlex.quote(sys.executable)} -m sst_jax.{name}"
    program, own = Parser.program.strip(), sys.argv[0]
    found = shutil.which(program)
    if os.path.basename(own) == program and (found is None or os.path.realpath(found) != os.path.realpath(own)):
        program = shlex.quote(os.path.abspath(own))
    return f"{program} {name}"


def run(main: Callable[[Sequence[str]], object], argv: Sequence[str] | None = None) -> int:
    """Run `main(argv)` and return the exit code."""
    try:
        main(sys.argv[1:] if argv is None else argv)
    except InputError as error:
        # One line without control characters: names from files are part of the message.
        print("error:", "".join(c if c.isprintable() else " " for c in str(error)), file=sys.stderr)
        return 2
    except SystemExit as leaving:  # argparse's --help
        return leaving.code if isinstance(leaving.code, int) else 1
    except RunInterrupted as leaving:
        print(leaving, file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or the interpreter complains while closing
        return 1
    except Exception as error:
        if isinstance(error, OSError) and error.errno == errno.ENAMETOOLONG:  # whatever option it came from
            print(f"error: {str(error.filename)[:80]}...: {os.strerror(error.errno)}", file=sys.stderr)
            return 2
        from sst_jax.files import disk_error  # it comes with JAX

        reason = disk_error(error) if isinstance(error, OSError) else None
        if reason is None:
            traceback.print_exc()
        else:  # a write that fails half-way does not know its file
            where = getattr(error, "filename", None) or "what was to be written"
            print(f"error: {where}: {reason}", file=sys.stderr)
        return 1
    return 0


def write_json(path: str | os.PathLike[str], value: JsonValue) -> None:
    """Write `value` to a temporary file and rename it, so that a reader never sees half a file."""
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, sort_keys=False, allow_nan=False)
            file.write("\n")
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(name, 0o666 & ~umask)  # mkstemp's 0600 would hide the result from a group that shares the folder
        os.replace(name, path)
    except BaseException:
        pathlib.Path(name).unlink(missing_ok=True)
        raise


def numbers(flag: str, text: str, kind: type[Number]) -> list[Number]:
    """Return the numbers of a flag that takes several, separated by commas.

    Raises: InputError naming the flag, where one is not of that kind, or not positive.
    """
    try:
        values = [kind(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise InputError(f"{flag} {text}: not a list of {kind.__name__}s separated by commas") from None
    if not values or min(values) <= 0:
        raise InputError(f"{flag} {text}: needs positive numbers")
    return values


def folder_for(flag: str, path: str | os.PathLike[str]) -> pathlib.Path:
    """Return the folder that a flag names, creating it if needed.

    Raises: InputError where it cannot be one, or cannot be written to.
    """
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{flag}: {path} cannot be a folder: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise InputError(f"{flag}: {path} cannot be written to")
    return pathlib.Path(path)


def new_folder(path: str) -> pathlib.Path:
    """Return the folder that --to names.

    Raises: InputError when it holds anything: checked before any work, and once more when the output is put there.
    """
    target = pathlib.Path(path).expanduser()
    if target.is_dir() and any(target.iterdir()):
        raise InputError(f"--to {target} is not empty: nothing is overwritten, choose another folder")
    return target

"""The command `sst-jax COMMAND ...`, also `python -m sst_jax COMMAND ...`: the same as `python -m sst_jax.COMMAND ...`.

Only the command that is asked for is imported; the list of commands is read from their files.
"""

from __future__ import annotations

import ast
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sst_jax import __version__
from sst_jax.console.command import Parser, run
from sst_jax.errors import InputError

COMMANDS = (
    "train",
    "recipe",
    "dataset",
    "generate",
    "chat",
    "serve",
    "evaluate",
    "compare",
    "pair",
    "analyze",
    "probe",
    "convert",
    "export",
    "plan",
    "measure",
)

# Behind a command come its flags and files. zsh reads bash's words by its own bashcompinit.
COMPLETION = """\
_sst_jax() {{
  local word=${{COMP_WORDS[COMP_CWORD]}} words
  if [ "$COMP_CWORD" = 1 ]; then words="{commands} --help --version"
  elif [[ $word == -* ]]; then
    words=$("${{COMP_WORDS[0]}}" "${{COMP_WORDS[1]}}" --help | grep -oE -e '--[a-z][a-z-]+' | sort -u)
  else COMPREPLY=($(compgen -f -- "$word")); return; fi
  COMPREPLY=($(compgen -W "$words" -- "$word"))
}}
[ -z "${{ZSH_VERSION:-}}" ] || {{ autoload -U bashcompinit && bashcompinit; }}
complete -o filenames -F _sst_jax sst-jax"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; `argv` is what follows the program's name, None: sys.argv's."""
    program = "sst-jax" if os.path.basename(sys.argv[0]).startswith("sst-jax") else "python -m sst_jax"
    argv = sys.argv[1:] if argv is None else argv
    name, rest = (argv[0], argv[1:]) if argv else ("", ())
    if name in COMMANDS:
        Parser.program = f"{program} "
        return run(importlib.import_module(f"sst_jax.{name}").main, rest)
    return run(lambda _: explain(program, name), rest)


def explain(program: str, name: str) -> None:
    """Print the version, what a shell completes commands by, or which commands there are.

    Raises: InputError where `name` is neither a flag nor a command.
    """
    if name == "--version":
        print(f"sst-jax {__version__}")
    elif name == "--completion":
        print(COMPLETION.format(commands=" ".join(COMMANDS)))
    elif name in ("--help", "-h"):
        print(f"usage: {program} COMMAND ...\n\ncommands (COMMAND --help tells more):")
        for each in COMMANDS:
            print(f"  {each:10} {summary(each)}")
        print(f"\n{program} --version prints the version, --completion what bash and zsh complete commands by:")
        print('  eval "$(sst-jax --completion)"')
    else:
        problem = f"there is no command {name!r}" if name else "a command is missing"
        raise InputError(f"{problem}; commands are {', '.join(COMMANDS)} (see {program} --help)")


def summary(name: str) -> str:
    """Return the first line of a command's docstring, without importing the command."""
    source = Path(__file__).with_name(f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(source)) or ""
    return docstring.partition("\n")[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())

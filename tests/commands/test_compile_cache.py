"""Compiled programs are kept between processes, where the settings say, unless a flag says not."""

import os
import subprocess
import sys

import pytest

from sst_jax.console import compile_cache
from sst_jax.console.command import Parser

COMPILE = """
import sys
{before}
from sst_jax.console.command import Parser
import sst_jax
{how}
import jax
assert jax.jit(lambda x: jax.lax.fori_loop(0, 9, lambda _, x: jax.numpy.sort(x @ x), x))(jax.numpy.ones((8, 8))).size
print(jax.config.jax_compilation_cache_dir)
"""
COMMAND = "Parser(prog='x').parse_args(sys.argv[1:])"
LOAD = "sst_jax.load('random:tiny')"


def kept(tmp_path, how, *arguments, before="", **variables):
    """What a process that compiles a program leaves in the folder, and the folder that it has set."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_COMPILATION", "JAX_PERSIS"))}
    env |= {"JAX_PLATFORMS": "cpu", "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "0", "HOME": str(tmp_path)} | variables
    code = COMPILE.format(
        how=f"from sst_jax.console import compile_cache; compile_cache.MIN_SECONDS = 0; {how}", before=before
    )
    done = subprocess.run([sys.executable, "-c", code, *arguments], env=env, capture_output=True, text=True, check=True)
    return [file for file in tmp_path.rglob("jit_*") if file.is_file()], done.stdout.split()[-1]


def test_a_command_keeps_programs_in_the_folder_that_is_named(tmp_path):
    files, folder = kept(tmp_path, COMMAND, SST_JAX_CACHE=str(tmp_path / "mine"))
    assert files
    assert folder == str(compile_cache.folder()).replace(str(compile_cache.folder().parent), str(tmp_path / "mine"))


def test_load_keeps_them_too_though_jax_has_compiled_before(tmp_path):
    files, folder = kept(tmp_path, LOAD, before="import jax; jax.jit(lambda x: x + 1)(1.0)")
    assert files
    assert folder.startswith(str(tmp_path / ".cache" / "sst_jax" / "xla"))


@pytest.mark.parametrize(
    ("arguments", "variables"), [(["--no-compile-cache"], {}), ([], {"SST_JAX_CACHE": ""})], ids=["flag", "variable"]
)
def test_none_are_kept_where_nobody_wants_them(tmp_path, arguments, variables):
    assert kept(tmp_path, COMMAND, *arguments, **variables) == ([], "None")


def test_jax_s_own_setting_comes_first(tmp_path):
    _, folder = kept(
        tmp_path, COMMAND, JAX_COMPILATION_CACHE_DIR=str(tmp_path / "jax"), SST_JAX_CACHE=str(tmp_path / "x")
    )
    assert folder == str(tmp_path / "jax")


def test_every_command_has_the_flag():
    assert "--no-compile-cache" in Parser(prog="x").format_help()

"""For all rooms: tests run on the CPU, whose arithmetic their tolerances are made for."""

import gc
import os
import time
from collections import Counter
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Toys cost compiling, hardly running. Without optimisations and with its former CPU code generator, XLA compiles in a
# quarter of the time. Subprocesses inherit both. JAX_DISABLE_MOST_OPTIMIZATIONS=0 has everything compiled as users do.
if os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1") == "1" and version("jaxlib").startswith("0.10."):
    # Later versions may not know the flags, and an unknown one ends the process.
    flags = "--xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flags}"

import jax
import pytest

# Tracing makes objects by the hundred thousand, nearly all of which live: to look for cycles among them every 700 took
# a fifth of its time.
gc.set_threshold(100_000, 20, 50)

DEADLINE = pytest.StashKey[float]()  # of --minutes, on the monotonic clock


def pytest_addoption(parser, pluginmanager):
    parser.addoption(
        "--typecheck", action="store_true", help="check every annotation of sst_jax at run time: shapes, dtypes, types"
    )
    parser.addoption(
        "--every",
        type=int,
        default=1,
        metavar="N",
        help="run the first of every N tests of a file; default 1",
    )
    parser.addoption(
        "--minutes",
        type=float,
        default=float("inf"),
        metavar="M",
        help="begin no test later than M minutes after the first: the others are skipped; default: no limit",
    )
    parser.addoption(
        "--turn",
        type=int,
        default=0,
        metavar="N",
        help="begin with another file than the first and go round, so that --minutes leaves out others; default 0",
    )
    # Now, and not in pytest_configure: the rooms' conftest files, which import the package, are read in between.
    config = pluginmanager.get_plugin("pytestconfig")
    if "--typecheck" in config.invocation_params.args or getattr(config.option, "typecheck", False):  # or: in a worker
        from jaxtyping import install_import_hook

        # A float may be an int, as PEP 484 says and mypy reads it.
        install_import_hook("sst_jax", "beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))")


def pytest_configure(config):
    config.stash[DEADLINE] = time.monotonic() + 60 * config.getoption("minutes")


@pytest.hookimpl(tryfirst=True)  # before -m chooses
def pytest_collection_modifyitems(config, items):
    mark_further_cases_slow(items)
    files = list(dict.fromkeys(item.path for item in items))
    if files:
        # A large step, whose multiples come near every file early on: neighbours are of one kind.
        first = files[config.getoption("turn") * (round(len(files) * 0.382) or 1) % len(files)]
        start = next(number for number, item in enumerate(items) if item.path == first)
        items[:] = items[start:] + items[:start]
    every = config.getoption("every")
    if every > 1:
        seen = Counter()
        chosen, left_out = [], []
        for item in items:
            (left_out if seen[item.path] % every else chosen).append(item)
            seen[item.path] += 1
        items[:] = chosen
        config.hook.pytest_deselected(items=left_out)
    if config.getoption("typecheck"):
        for item in items:
            if item.get_closest_marker("wrong_types"):
                item.add_marker(pytest.mark.skip(reason="--typecheck refuses wrong types before the package can"))


def mark_further_cases_slow(items):
    """Mark all cases of a swept test as slow but the number that its mark `fast_cases` names, spread evenly."""
    swept = {}
    for item in items:
        if item.get_closest_marker("fast_cases") and not item.get_closest_marker("slow"):
            swept.setdefault((item.path, item.originalname), []).append(item)
    for cases in swept.values():
        (number,) = cases[0].get_closest_marker("fast_cases").args
        fast = {place * len(cases) // number for place in range(number)}
        for place, item in enumerate(cases):
            if place not in fast:
                item.add_marker(pytest.mark.slow)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    if time.monotonic() > item.config.stash[DEADLINE]:
        pytest.skip("its turn did not come within --minutes")


@pytest.fixture(scope="session", autouse=True)
def compilation_cache(tmp_path_factory):
    """Tests compile many programs more than once: keep them for the session, for workers and subprocesses too.

    Where JAX_COMPILATION_CACHE_DIR is set, they are kept there, for the sessions that follow.
    """
    if os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        return
    shared = tmp_path_factory.getbasetemp()
    shared = shared.parent if "PYTEST_XDIST_WORKER" in os.environ else shared
    settings = {
        "jax_compilation_cache_dir": str(shared / "xla"),
        "jax_persistent_cache_min_compile_time_secs": 0.05,
        "jax_persistent_cache_min_entry_size_bytes": 0,
    }
    for name, value in settings.items():
        jax.config.update(name, value)
        os.environ[name.upper()] = str(value)


@pytest.fixture
def float64():
    """JAX in 64-bit mode for the length of one test."""
    with jax.enable_x64(True):
        yield


@pytest.fixture(autouse=True, scope="module")
def compile_as_users_do(request):
    """Modules that are marked `optimised` as a whole: random weights, say, differ in a bit without optimisations."""
    quick = os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1"
    if not quick or request.node.get_closest_marker("optimised") is None:
        yield
        return
    compile_quickly(False)
    yield
    compile_quickly(True)


def compile_quickly(quick):
    """Set how this process and its subprocesses compile; what was compiled the other way is forgotten."""
    jax.config.update("jax_disable_most_optimizations", quick)
    os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1" if quick else "0"
    jax.clear_caches()


@pytest.fixture(autouse=True, scope="module")
def forget_programs():
    """Thousands of compiled programs would fill the memory of a small machine; few are worth compiling again."""
    yield
    if resident_gib() > 3:
        jax.clear_caches()


def resident_gib():
    """Return this process's resident memory in GiB where Linux says it, else infinity."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return float("inf")
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30

"""The pages against the repository: links and paths lead somewhere, and the commands shown are ones that parse."""

import argparse
import ast
import importlib
import re
import shlex
from pathlib import Path

import pytest

from sst_jax.errors import InputError
from sst_jax.training import recipe

ROOT = Path(__file__).parent.parent
PAGES = sorted(
    path
    for path in (
        *ROOT.glob("*.md"),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "third_party/README.md",
        *(ROOT / "configs").glob("*.py"),
    )
)
TOP = ("sst_jax", "configs", "tests", "docs", "benchmarks", "examples", "launch", "third_party")
COMMAND = re.compile(r"(?:sst-jax|python3? -m sst_jax[. ])\s*([a-z]+)\b(.*)")


class Parsed(Exception):
    """Raised where a command has parsed its arguments, so that it does nothing more."""


def text_of(page: Path) -> str:
    text = page.read_text(encoding="utf-8")
    return text if page.suffix == ".md" else ast.get_docstring(ast.parse(text)) or ""


def prose_of(page: Path) -> str:
    """A page without its blocks of code."""
    text = re.sub(r"^```.*?^```", "", text_of(page), flags=re.M | re.S)
    return "\n".join(line for line in text.splitlines() if not line.startswith("    "))


def lines_of_code(page: Path) -> list[str]:
    """The lines of a page's blocks of code, and what stands in backticks, continued lines joined."""
    text = text_of(page)
    fenced = "\n".join(re.findall(r"^```[a-z]*\n(.*?)^```", text, flags=re.M | re.S))
    indented = "\n".join(line for line in text.splitlines() if line.startswith("    "))
    spans = re.findall(r"`([^`\n]+)`", prose_of(page))
    return [*re.sub(r"\\\n\s*", " ", f"{fenced}\n{indented}").splitlines(), *spans]


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


def commands() -> list[tuple[str, str, str]]:
    """(page, command, arguments) of every command that a page shows in full."""
    found = set()
    for page in PAGES:
        for line in lines_of_code(page):
            for name, rest in COMMAND.findall(line):
                rest = re.split(r"&&|[;|>)]| \.\.\.", rest)[0]
                if " --" in f" {rest}":  # the bare name of a command is checked with the paths
                    found.add((str(page.relative_to(ROOT)), name, rest))
    return sorted(found)


def ids(case: tuple[str, ...]) -> str:
    return " ".join(case)[:100]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = (page.parent / name) if name else page
        assert file.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), flags=re.M)
            assert anchor in map(slug, headings), f"{page.name} links to {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_path_of_the_repository_that_a_page_names_exists(page):
    packages = [path.name for path in (ROOT / "sst_jax").iterdir() if (path / "__init__.py").is_file()]
    for token in re.findall(r"[\w./*-]+/[\w./*-]*", "\n".join(lines_of_code(page))):
        token, first = token.rstrip("."), token.split("/")[0]
        if first in TOP and not token.startswith("configs/X"):
            assert list(ROOT.glob(token.rstrip("/"))), f"{page.name} names {token}"
    for token in re.findall(r"`([a-z_]+/[\w./]+\.py)`", prose_of(page)):
        if token.split("/")[0] in packages:
            assert (ROOT / "sst_jax" / token).is_file(), f"{page.name} names {token}"


@pytest.mark.parametrize("case", commands(), ids=ids)
def test_every_command_that_a_page_shows_parses(case, monkeypatch):
    _, name, rest = case
    parse = argparse.ArgumentParser.parse_args

    def stop(self, args=None, namespace=None):
        parse(self, args, namespace)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", stop)
    argv = shlex.split(rest, comments=True)
    with pytest.raises(Parsed):
        importlib.import_module(f"sst_jax.{name}").main(argv)
    overrides = [argument for argument in argv if argument.startswith("--config.")]
    file = ROOT / argv[argv.index("--config") + 1].split(":")[0] if "--config" in argv else None
    if file is not None and file.is_file():
        recipe.read(str(ROOT / argv[argv.index("--config") + 1]), overrides)


def test_a_command_with_an_unknown_flag_or_knob_would_be_found():
    with pytest.raises(InputError, match="--depths"):
        importlib.import_module("sst_jax.generate").main(["--model", "MODEL", "--prompt", "A", "--depths", "4"])
    with pytest.raises(InputError, match="stepz"):
        recipe.read(str(ROOT / "configs/tiny.py"), ["--config.train.stepz=3"])
    assert len(commands()) > 40


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_of_a_benchmark_that_a_page_shows_is_one_of_its_own(page):
    for line in lines_of_code(page):
        for name, rest in re.findall(r"python (benchmarks/\w+\.py)([^)]*)", line):
            source = (ROOT / name).read_text(encoding="utf-8")
            for flag in re.findall(r"--[a-z][\w-]*(?=[\s=]|$)", rest.split("#")[0]):
                assert f'"{flag}"' in source, f"{page.name}: {name} has no {flag}"


def test_the_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_architecture_page_names_every_scope_of_a_trace():
    page = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    scopes = {
        name
        for file in (ROOT / "sst_jax").rglob("*.py")
        for name in re.findall(r'named_scope\("([\w/]+)"', file.read_text(encoding="utf-8"))
    }
    assert scopes
    assert {name for name in scopes if f"`{name}`" not in page} == set()

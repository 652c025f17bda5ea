"""The pages of docs/ that are written by adding something: their code, and the files that it stands in."""

from collections.abc import Sequence

from tests.support import ROOT


def read_guide(name: str) -> str:
    """Return a page of docs/."""
    return (ROOT / "docs" / name).read_text(encoding="utf-8")


def code_blocks(guide: str) -> list[str]:
    """Return a page's blocks of Python."""
    return [part.partition("```")[0] for part in guide.split("```python\n")[1:]]


def check_quotes(name: str, files: Sequence[str], least: int) -> None:
    """Check that a page names the files, and that each of its `least` or more blocks stands in one, line for line."""
    guide, text = read_guide(name), "\n\n".join((ROOT / file).read_text(encoding="utf-8") for file in files)
    blocks = code_blocks(guide)
    assert len(blocks) >= least
    for block in blocks:
        assert block in text, block
    for file in files:
        assert f"`{file}`" in guide

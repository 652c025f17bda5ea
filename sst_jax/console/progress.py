"""Progress bars with rate and ETA on a terminal; nothing at all elsewhere."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm


def bar(total: int | None, description: str, unit: str = "it", **kwargs: Any) -> tqdm:
    """A tqdm bar on standard error, silent when that is not a terminal."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
        **kwargs,
    )


def print_line(text: str) -> None:
    """Prints a line of human text without tearing a bar that is up."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()

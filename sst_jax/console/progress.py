"""Progress bars with rate and ETA, on a terminal only, and counts in words."""

from __future__ import annotations

import sys

from tqdm import tqdm


def bar(total: int | None, description: str, unit: str = "it", unit_scale: bool = False, initial: int = 0) -> tqdm:
    """Return a tqdm bar on standard error, disabled when that is not a terminal."""
    return tqdm(
        total=total,
        desc=description,
        unit=unit,
        disable=not sys.stderr.isatty(),
        dynamic_ncols=True,
        leave=False,
        file=sys.stderr,
        unit_scale=unit_scale,
        initial=initial,
    )


def print_line(text: str) -> None:
    """Print a line of text without breaking a progress bar that is shown."""
    tqdm.write(text, file=sys.stdout)
    sys.stdout.flush()


def counted(number: int, noun: str) -> str:
    """Return "1 token", "2 tokens", "1,024 tokens"."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"

"""Packages of the optional extras, imported where they are first used."""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType

from sst_jax.errors import InputError


def require(module: str, extra: str, purpose: str) -> ModuleType:
    """Return a module of an optional package.

    Args:
        module: its dotted name, such as "sklearn.mixture".
        extra: of this package, which installs it.
        purpose: what needs it, the subject of the message.

    Raises: InputError naming the extra, where the package is not installed.
    """
    check((module.partition(".")[0],), extra, purpose)
    return importlib.import_module(module)


def check(packages: tuple[str, ...], extra: str, purpose: str) -> None:
    """Raise InputError where one of an extra's packages is not installed, without importing any."""
    for package in packages:
        if importlib.util.find_spec(package) is None:
            raise InputError(f"{purpose} needs {package}, which is not installed: pip install 'sst-jax[{extra}]'")

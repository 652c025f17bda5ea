"""The package's version, in one place: pyproject.toml reads it here too."""

VERSION = "0.1.0"

"""What tests share: toy models, oracles, writers of small files, and drivers of long runs."""

import pathlib

ROOT = pathlib.Path(__file__).parents[2]

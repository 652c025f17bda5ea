"""Measuring models on tasks, and comparing what was measured: `run`, `compare`."""

from sst_jax.lab.evaluation.evaluation import EvalConfig, run
from sst_jax.lab.evaluation.paired_stats import compare

__all__ = ["EvalConfig", "compare", "run"]

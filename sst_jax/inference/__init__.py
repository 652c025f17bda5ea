"""Inference: caches, the decode step, sampling, and the public `Model`."""

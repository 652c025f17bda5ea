"""Inference: sessions, caches, the decode step, sampling, depth policies, and the public `Model`."""

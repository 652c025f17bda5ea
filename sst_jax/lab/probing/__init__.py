"""Probes that choose the depth: their data set, their fit, and what they are measured against."""

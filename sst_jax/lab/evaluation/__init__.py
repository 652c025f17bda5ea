"""Evaluation: tasks, answers read and graded, resumable runs over items and depth policies, and their comparison."""

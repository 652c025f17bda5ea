"""Shared by the commands: exit codes, progress bars, JSON results, optional packages."""

"""What the commands share: exit codes, progress bars, JSON results."""

"""Studies: arms of matched comparisons, and tiny models trained from scratch."""

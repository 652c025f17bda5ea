"""Training: the loss, the step, the optimizer, checkpoints, metrics and the run folder."""

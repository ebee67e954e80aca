"""Training: the loop, the optimizers, checkpoints, hooks, process start, and the trainer."""

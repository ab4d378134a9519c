"""A training run: the loop, its settings and data, step, optimiser, average, checkpoints, log and processes."""

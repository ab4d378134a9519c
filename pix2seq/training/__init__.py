"""A training run: step, schedule, average, checkpoints, logs and the loop around them."""

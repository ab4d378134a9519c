"""Training recipes, one file a task, each read top to bottom; imported as `pix2seq.train`."""

"""Training scripts, one per task, and one for several tasks; imported as `pix2seq.train`."""

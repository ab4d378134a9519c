"""Inference from the command line; imported as `pix2seq.infer`."""

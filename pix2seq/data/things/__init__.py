"""A data set of scenes that are composed from cut-outs: images with an alpha channel, named by their files."""

from pix2seq.data.things.writer import write_things

__all__ = ["write_things"]

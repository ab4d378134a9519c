"""A generated data set with all four kinds of annotation, so that nothing need be downloaded to see a task work."""

from pix2seq.data.shapes.sheet import contact_sheet
from pix2seq.data.shapes.writer import write_shapes

__all__ = ["contact_sheet", "write_shapes"]

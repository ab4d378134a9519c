"""A generated data set with all four kinds of annotation, to try every task without a download."""

from pix2seq.data.shapes.writer import contact_sheet, write_shapes

__all__ = ["contact_sheet", "write_shapes"]

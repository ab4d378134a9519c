"""Boxes, polygons, masks, keypoints and affine maps: NumPy only, formats in every name."""

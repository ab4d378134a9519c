"""Boxes, polygons, masks, keypoints and affine maps, on NumPy only; names say the format."""

"""Read, check, generate and batch annotated images."""

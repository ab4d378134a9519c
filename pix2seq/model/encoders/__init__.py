"""Image encoders, one file each."""

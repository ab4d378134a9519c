"""Encoder, decoder, the joined model and generation. Knows ids, masks and features, and no task."""

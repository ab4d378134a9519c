"""Encoders, decoder, the complete model and generation. They know ids, masks and features, but no tasks."""

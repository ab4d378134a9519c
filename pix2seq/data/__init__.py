"""Reading, checking, generating and batching annotated images."""

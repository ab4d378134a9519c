"""Reading, checking, generating and batching annotated pictures."""

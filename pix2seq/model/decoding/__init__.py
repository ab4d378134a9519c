"""Autoregressive generation: cache, steps, grammar and sampling."""

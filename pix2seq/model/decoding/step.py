"""Decoder steps in their fastest form: plain, for the CPU, or as a CUDA graph.

Shapes: R rows, t tokens, D width, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from pix2seq.model.decoder import Decoder
from pix2seq.model.decoding.cpu_step import CpuStep
from pix2seq.model.decoding.graph_step import GraphStep
from pix2seq.model.decoding.kv_cache import KVCache


class DecoderStep:
    """A decoder with its cache. In evaluation mode without gradients, it reads single tokens with a fast step.

    A decoder with another kind of cache, such as a fake one in tests, takes its own steps and keeps all rows.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        self.decoder, self.cache = decoder, cache
        self.has_kv_cache = isinstance(cache, KVCache)
        self._fast: CpuStep | GraphStep | None = None  # created at its first use, for the current rows
        self._can_be_fast = (
            self.has_kv_cache
            and cache.device.type in ("cpu", "cuda")
            and cache.dtype in (torch.float32, torch.bfloat16)
            and not decoder.training
        )

    def read(self, tokens: Tensor) -> Tensor:
        """Read the next tokens (R, t) of every row. Return the hidden states (R, D) after the last."""
        if tokens.shape[1] > 1 or not self._can_be_fast or torch.is_grad_enabled():
            return self.decoder.step(tokens, self.cache)
        self.decoder.check_length(self.cache.length + 1)
        with _no_autocast(self.cache.device.type):
            if self._fast is None:
                self._fast = (GraphStep if self.cache.device.type == "cuda" else CpuStep)(self.decoder, self.cache)
            hidden = self._fast.hidden(tokens[:, 0], self.cache.length)
        self.cache.length += 1
        return hidden

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        """Map the hidden states (R, D) of the last `read` to logits (R, V), or only to those of `ids`."""
        if self._fast is None:
            return self.decoder.logits(hidden) if ids is None else self.decoder.logits(hidden, ids)
        with _no_autocast(self.cache.device.type):
            return self._fast.logits(hidden, ids)

    def keep(self, images: Tensor, rows: Tensor) -> None:
        """Keep only these images and rows; see `KVCache.keep`."""
        self.cache.keep(images, rows)
        self._fast = None


@contextmanager
def _no_autocast(device_type: str) -> Iterator[None]:
    """Turn autocast off: a fast step chooses its own types, and autocast would convert all weights at every step."""
    enabled = torch.is_autocast_enabled(device_type)
    torch.set_autocast_enabled(device_type, False)
    try:
        yield
    finally:
        torch.set_autocast_enabled(device_type, enabled)

"""Keys and values that generation keeps between steps.

Shapes: B images, R rows (R = B * rows per image), H heads, S slots, N memory tokens, d head width.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """Keys and values of one decoder layer.

    float32 keys on the CPU are stored as (..., d, S), though their shape is as below. The products of a query with
    all keys then read memory sequentially, which is a third faster.
    """

    self_keys: Tensor  # (R, H, S, d), valid up to the cache's length
    self_values: Tensor  # (R, H, S, d)
    memory_keys: Tensor  # (B, H, N, d), shared by all rows of an image
    memory_values: Tensor  # (B, H, N, d)


class KVCache:
    """A cache of fixed size for S tokens per row, of which `length` are filled."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self.length = 0

    @classmethod
    def allocate(cls, memory_keys_values: Iterable[tuple[Tensor, Tensor]], *, num_rows: int, num_slots: int) -> KVCache:
        """Create an empty cache. `memory_keys_values` are the projected memory of each layer, (B, H, N, d)."""
        layers = []
        for keys, values in memory_keys_values:
            _, num_heads, _, head_dim = keys.shape
            empty = torch.empty((2, num_rows, num_heads, num_slots, head_dim), dtype=keys.dtype, device=keys.device)
            if keys.device.type == "cpu":
                # Interleaved heads would be read a third slower, at every step.
                keys = _keys_first(keys) if keys.dtype == torch.float32 else keys.contiguous()
                values = values.contiguous()
            self_keys = empty[0].view(num_rows, num_heads, head_dim, num_slots).transpose(2, 3)
            layers.append(LayerCache(self_keys if is_keys_first(keys) else empty[0], empty[1], keys, values))
        return cls(layers)

    @property
    def device(self) -> torch.device:
        """The device of keys and values."""
        return self.layers[0].self_keys.device

    @property
    def dtype(self) -> torch.dtype:
        """The data type of keys and values."""
        return self.layers[0].self_keys.dtype

    @property
    def num_slots(self) -> int:
        """Number of tokens that a row can hold."""
        return self.layers[0].self_keys.shape[2]

    @property
    def num_rows(self) -> int:
        """Number of rows."""
        return self.layers[0].self_keys.shape[0]

    def keep(self, images: Tensor, rows: Tensor) -> None:
        """Keep only these images (B',) and rows (R',), the same number of rows for each image, in order of images."""
        all_images = len(images) == self.layers[0].memory_keys.shape[0]
        for layer in self.layers:
            layer.self_keys = _select(layer.self_keys, rows)
            layer.self_values = _select(layer.self_values, rows)
            if not all_images:
                layer.memory_keys = _select(layer.memory_keys, images)
                layer.memory_values = _select(layer.memory_values, images)


def is_keys_first(x: Tensor) -> bool:
    """Return whether x (..., S, d) is stored as (..., d, S)."""
    return x.stride(-1) != 1


def _keys_first(x: Tensor) -> Tensor:
    """Return x (..., S, d), stored as (..., d, S)."""
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


def _select(x: Tensor, indices: Tensor) -> Tensor:
    """Select from the first dimension, and keep the memory layout."""
    if is_keys_first(x):
        return x.transpose(-1, -2).index_select(0, indices).transpose(-1, -2)
    return x.index_select(0, indices)

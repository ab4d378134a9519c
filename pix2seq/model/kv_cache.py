"""What generation remembers between steps.

Shapes: B images, R rows (R = B * rows per image), H heads, S slots, N memory tokens, d head width.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LayerCache:
    """Keys and values of one decoder layer."""

    self_keys: Tensor  # (R, H, S, d), filled up to the cache's length
    self_values: Tensor  # (R, H, S, d)
    memory_keys: Tensor  # (B, H, N, d), shared by all rows of an image
    memory_values: Tensor  # (B, H, N, d)


class KVCache:
    """Sized once for S tokens a row; `length` of them are filled. The caller owns it."""

    def __init__(self, layers: list[LayerCache]) -> None:
        self.layers = layers
        self.length = 0

    @classmethod
    def allocate(cls, memory_keys_values: list[tuple[Tensor, Tensor]], *, num_rows: int, num_slots: int) -> KVCache:
        """An empty cache over the projected memory of each layer, keys and values (B, H, N, d)."""
        layers = []
        for keys, values in memory_keys_values:
            _, num_heads, _, head_dim = keys.shape
            shape = (num_rows, num_heads, num_slots, head_dim)
            empty = torch.empty((2, *shape), dtype=keys.dtype, device=keys.device)
            layers.append(LayerCache(empty[0], empty[1], keys, values))
        return cls(layers)

    @property
    def num_slots(self) -> int:
        """How many tokens a row can hold."""
        return self.layers[0].self_keys.shape[2]

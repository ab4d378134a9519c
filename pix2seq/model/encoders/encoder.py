"""The interface of an image encoder: (B, 3, H, W) in [0, 1] to features (B, N, D) and their grid."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn

Maps = tuple[Tensor, ...]
"""Feature maps (B, C, H, W) of the same images, each of its own width and stride."""


class Encoder(nn.Module, ABC):
    """Base class of image encoders."""

    dim: int  # width of the features
    stride: int  # pixels from one feature to the next
    finer_dims: tuple[int, ...] = ()  # widths of the maps that closeups are made of; empty: it makes none

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the features of an image, rounded down."""
        return height // self.stride, width // self.stride

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Encode images (B, 3, H, W) in [0, 1] as features (B, N, dim). Also return their grid."""

    def with_maps(self, images: Tensor) -> tuple[Tensor, tuple[int, int], Maps]:
        """Return what `forward` does, and the maps that closeups are made of, none if the encoder makes none."""
        return *self(images), ()

    def look_closer(self, sampled: Tensor) -> Tensor:
        """Encode closeups, sampled from the finer maps as (R, sum of `finer_dims`, 2 h, 2 w), as (R, N, dim).

        N are the features of an image of h x w patches.
        """
        raise NotImplementedError(f"{type(self).__name__} has no finer maps to look at")

    @abstractmethod
    def block_list(self) -> list[nn.Module]:
        """Return blocks of about equal size, which are compiled and sharded one by one."""

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """See `Pix2Seq.set_activation_checkpointing`."""

"""The interface of an image encoder: (B, 3, H, W) in [0, 1] to features (B, N, D) and their grid."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor, nn


class Encoder(nn.Module, ABC):
    """Base class of image encoders."""

    dim: int  # width of the features
    stride: int  # pixels from one feature to the next

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the features of an image, rounded down."""
        return height // self.stride, width // self.stride

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Encode images (B, 3, H, W) in [0, 1] as features (B, N, dim). Also return their grid."""

    @abstractmethod
    def block_list(self) -> list[nn.Module]:
        """Return blocks of about equal size, which are compiled and sharded one by one."""

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """See `Pix2Seq.set_activation_checkpointing`."""

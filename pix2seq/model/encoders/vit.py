"""A pre-norm Vision Transformer with the official patch stem, or a conv stem that learns faster from scratch.

Reference: google-research/pix2seq, `architectures/transformers.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.errors import InputError
from pix2seq.model.encoders.convolutions import ConvStem, ResidualBlock
from pix2seq.model.encoders.encoder import Encoder, Maps
from pix2seq.model.layers import NORM_EPS, EncoderBlock, LayerStack, init_weights
from pix2seq.model.positions import GridPositions, PositionKind


class VisionTransformer(Encoder):
    """A pre-norm ViT. With fixed position encodings, it takes any rectangle of patches."""

    def __init__(
        self,
        stem: nn.Module,
        stride: int,
        *,
        image_size: tuple[int, int],
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        class_token: bool = False,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        positions: PositionKind = "sincos",
        closeups: bool = False,
        colour: bool = False,
    ) -> None:
        """`stem` maps images to (B, dim, H / stride, W / stride). Learned positions fit only `image_size`.

        With `closeups` it can `look_closer`, which needs a convolutional stem. With `colour`, the mean colour of each
        patch is added to its feature by a linear layer that starts at zero; closeups are without.
        """
        super().__init__()
        self.dim = dim
        self.stride = stride
        self.stem = stem
        self.stem_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.class_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, dim), std=0.02)) if class_token else None
        self.positions = GridPositions(positions, dim, self.grid(*image_size))
        self.blocks: LayerStack[EncoderBlock] = LayerStack(
            EncoderBlock(dim, num_heads, mlp_dim, dropout, drop_path) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.closeup_stem: nn.Linear | None = None
        if closeups:
            if not isinstance(stem, ConvStem) or not stem.map_dims:
                raise InputError(
                    "closeups need the finer maps of model.encoder.stem=conv with a patch size of 8 or more"
                )
            self.finer_dims = stem.map_dims
            self.closeup_stem = nn.Linear(4 * sum(stem.map_dims), dim)
        self.colour = nn.Linear(3, dim, bias=False) if colour else None
        self.apply(init_weights)
        if self.colour is not None:
            nn.init.zeros_(self.colour.weight)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.init_as_identity()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Encode images (B, 3, H, W) in [0, 1] as features (B, N, dim), class token first. Also return their grid."""
        features = self.stem(images)
        return self._whole(images, features), _size(features)

    def with_maps(self, images: Tensor) -> tuple[Tensor, tuple[int, int], Maps]:
        """See `Encoder`."""
        if self.closeup_stem is None:
            return super().with_maps(images)
        assert isinstance(self.stem, ConvStem)
        features, maps = self.stem.with_maps(images)
        return self._whole(images, features), _size(features), maps

    def look_closer(self, sampled: Tensor) -> Tensor:
        """See `Encoder`. Each feature comes from a square of 2 x 2 samples, as a patch does from its pixels."""
        if self.closeup_stem is None:
            return super().look_closer(sampled)
        grid = (sampled.shape[-2] // 2, sampled.shape[-1] // 2)
        squares = F.pixel_unshuffle(sampled, 2).flatten(2).transpose(1, 2)  # (R, N, 4 C)
        return self._transform(self.closeup_stem(squares), grid)

    def _whole(self, images: Tensor, features: Tensor) -> Tensor:
        """Encode the patches of whole images (B, 3, H, W)."""
        encoded = self._transform(features.flatten(2).transpose(1, 2), _size(features))
        if self.colour is None:
            return encoded
        means = F.adaptive_avg_pool2d(images - 0.5, _size(features)).flatten(2).transpose(1, 2)
        seen = self.colour(means.to(self.colour.weight.dtype))
        return encoded + (seen if self.class_token is None else F.pad(seen, (0, 0, 1, 0)))

    def _transform(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:
        """Encode patches (B, N, dim) of a grid."""
        x = self.stem_norm(patches)
        x = x + self.positions(*grid, x.device).to(x)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x).expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.blocks.run(x))

    def block_list(self) -> list[nn.Module]:
        """Return the Transformer blocks."""
        return list(self.blocks)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Enable it for the Transformer blocks. The convolutions of the stem keep their activations."""
        self.blocks.checkpointing = enabled


def _size(features: Tensor) -> tuple[int, int]:
    return features.shape[-2], features.shape[-1]

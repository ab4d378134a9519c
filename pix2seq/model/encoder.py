"""Image encoders: (B, 3, H, W) to patch features (B, N, D) and the grid (rows, columns) they lie on.

`VisionTransformer` is our own small one, with the official patch stem or a convolutional stem that
learns faster from scratch; `TimmEncoder` is any ViT or CNN of timm by name. Each owns the
normalisation of its input: images come in as [0, 1].
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from typing import Any, Literal

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.errors import InputError, unknown_name
from pix2seq.model.layers import NORM_EPS, EncoderBlock, LayerStack, init_weights
from pix2seq.model.positions import PositionKind, grid_codes


class Encoder(nn.Module, ABC):
    """What the joined model needs of an encoder."""

    dim: int  # width of the features
    stride: int  # pixels; input sizes must be divisible by it

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, 3, H, W) in [0, 1] to features (B, N, dim) and the grid of N places."""


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions around a shortcut (arXiv 1512.03385)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.first_norm = nn.BatchNorm2d(width)
        self.second = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.second_norm = nn.BatchNorm2d(width)
        nn.init.zeros_(self.second_norm.weight)  # starts as the identity

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        y = F.relu(self.first_norm(self.first(x)))
        return F.relu(x + self.second_norm(self.second(y)))


class ConvStem(nn.Module):
    """Strided 3x3 convolutions, each followed by residual blocks, in place of one large patch convolution.

    Convolutions know from the start that neighbouring pixels belong together; a ViT has to learn it,
    which takes more pictures than a small data set has (arXiv 2106.14881).
    """

    def __init__(self, dim: int, patch_size: int, num_blocks: int) -> None:
        """`num_blocks` residual blocks follow every halving but the first, the costliest."""
        super().__init__()
        num_halvings = patch_size.bit_length() - 1
        if 2**num_halvings != patch_size or num_halvings < 2:
            raise ValueError(f"a convolutional stem needs a patch size of 4, 8, 16 or 32, got {patch_size}")
        widths = [max(dim // 2 ** (num_halvings - 1 - i), 16) for i in range(num_halvings)]
        layers: list[nn.Module] = []
        for stage, (width_in, width_out) in enumerate(zip([3, *widths], widths, strict=False)):
            layers += [
                nn.Conv2d(width_in, width_out, 3, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width_out),
                nn.ReLU(inplace=True),
            ]
            if stage > 0:
                layers += [ResidualBlock(width_out) for _ in range(num_blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, dim, H / patch, W / patch)."""
        return self.layers(images.contiguous(memory_format=torch.channels_last))


class VisionTransformer(Encoder):
    """A pre-norm ViT with fixed positions, at home on any rectangle of patches."""

    def __init__(
        self,
        *,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        patch_size: int = 16,
        stem: Literal["patch", "conv"] = "patch",
        stem_blocks: int = 0,
        dropout: float = 0.0,
        drop_path: float = 0.0,
        positions: PositionKind = "sincos",
    ) -> None:
        super().__init__()
        self.dim = dim
        self.positions = positions
        self.stride = patch_size
        if stem == "conv":
            self.stem: nn.Module = ConvStem(dim, patch_size, stem_blocks)
        else:
            self.stem = nn.Conv2d(3, dim, patch_size, stride=patch_size)
        self.stem_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.blocks: LayerStack[EncoderBlock] = LayerStack(
            EncoderBlock(dim, num_heads, mlp_dim, dropout, drop_path) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.apply(init_weights)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, 3, H, W) in [0, 1] to features (B, N, dim) and the grid."""
        features = self.stem(images)
        grid = (features.shape[-2], features.shape[-1])
        x = self.stem_norm(features.flatten(2).transpose(1, 2))
        x = x + grid_codes(self.positions, *grid, self.dim).to(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x), grid


class TimmEncoder(Encoder):
    """A timm model without its head: the patch tokens of a ViT, or the last feature map of a CNN."""

    net: Any  # one of hundreds of classes
    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, *, image_size: tuple[int, int], pretrained: bool = False, drop_path: float = 0.0
    ) -> None:
        """Raises `InputError` for an unknown name, and where pretrained weights cannot be had."""
        super().__init__()
        if not timm.is_model(name):
            raise unknown_name("timm model", name, timm.list_models())
        self.is_vit = _is_plain_vit(name)
        options: dict[str, Any] = {"drop_path_rate": drop_path, "pretrained": pretrained}
        if self.is_vit:
            options |= {"img_size": image_size, "dynamic_img_size": True, "num_classes": 0}
        else:
            options |= {"features_only": True, "out_indices": (-1,)}
        try:
            self.net = timm.create_model(name, **options)
        except Exception as error:
            if not pretrained:
                raise
            raise InputError(
                f"pretrained weights of {name!r} could not be loaded ({type(error).__name__}); check the network, "
                "or train from scratch with model.encoder.pretrained=false"
            ) from error
        if self.is_vit:
            self.dim = self.net.num_features
            self.stride = self.net.patch_embed.patch_size[0]
            self.channels_last = False
        else:
            self.dim = self.net.feature_info.channels()[-1]
            self.stride = self.net.feature_info.reduction()[-1]
            self.channels_last = str(getattr(self.net, "output_fmt", "NCHW")).endswith("NHWC")
        config = timm.get_pretrained_cfg(name)
        assert config is not None  # every registered model has one
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, 3, H, W) in [0, 1] to features (B, N, dim) and the grid."""
        height, width = images.shape[-2:]
        images = (images - self.mean) / self.std
        if self.is_vit:
            tokens = self.net.forward_features(images)[:, self.net.num_prefix_tokens :]
            return tokens, (height // self.stride, width // self.stride)
        features = self.net(images)[-1]
        if self.channels_last:
            features = features.permute(0, 3, 1, 2)
        return features.flatten(2).transpose(1, 2), (features.shape[-2], features.shape[-1])


def _is_plain_vit(name: str) -> bool:
    """Whether timm's model gives tokens and resizes its positions; told without allocating weights."""
    with torch.device("meta"):
        net = timm.create_model(name)
    constructors = [cls.__dict__["__init__"] for cls in type(net).__mro__ if "__init__" in cls.__dict__]
    resizes = any("dynamic_img_size" in inspect.signature(c).parameters for c in constructors if inspect.isfunction(c))
    return resizes and hasattr(net, "num_prefix_tokens")

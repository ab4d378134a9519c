"""Convolutions with batch normalisation, residual blocks, and a convolutional stem for a ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EXPANSION = 4  # output channels of a bottleneck per inner channel


class ConvNorm(nn.Module):
    """A convolution without bias and batch normalisation. At stride 1, padding keeps the size."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width_out, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride), rounded up."""
        return self.norm(self.conv(x))


class ResidualBlock(nn.Module):
    """Convolutions with a shortcut: two 3x3, or 1x1, 3x3 and 1x1 in a bottleneck."""

    def __init__(
        self, width_in: int, width: int, *, stride: int = 1, bottleneck: bool = False, projection: bool = False
    ) -> None:
        """`width` is that of the inner convolutions. A `projection` fits the shortcut to the output."""
        super().__init__()
        if bottleneck:
            sizes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, EXPANSION * width, 1, 1)]
        else:
            sizes = [(width_in, width, 3, stride), (width, width, 3, 1)]
        self.convs = nn.ModuleList(ConvNorm(*size) for size in sizes)
        self.width_out = sizes[-1][1]
        self.shortcut = ConvNorm(width_in, self.width_out, 1, stride) if projection else nn.Identity()

    def init_as_identity(self) -> None:
        """Initialise the last norm to zero, so that the block passes its input through."""
        last = self.convs[-1]
        assert isinstance(last, ConvNorm)
        nn.init.zeros_(last.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride), rounded up."""
        y = x
        for index, conv in enumerate(self.convs):
            y = conv(y) if index == 0 else conv(F.relu(y))
        return F.relu(y + self.shortcut(x))


class ConvStem(nn.Module):
    """Strided 3x3 convolutions, each followed by residual blocks, instead of one large patch convolution.

    Convolutions are local by construction. A ViT has to learn locality, which takes more images than a small
    data set has (arXiv 2106.14881).
    """

    def __init__(self, dim: int, patch_size: int, num_blocks: int) -> None:
        """`num_blocks` residual blocks follow each strided convolution except the first, where they would cost most."""
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
                layers += [ResidualBlock(width_out, width_out) for _ in range(num_blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))
        stage = 3 + num_blocks
        # What leaves each stage but the first, whose features are nearly pixels, and the last.
        self.map_ends = [3 - 1 + stage * i for i in range(1, num_halvings - 1)]
        self.map_dims = tuple(widths[1:-1])

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, dim, H / patch, W / patch)."""
        return self.with_maps(images)[0]

    def with_maps(self, images: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return what `forward` does, and maps of strides 4 to patch / 2, each (B, width, H / stride, W / stride)."""
        x, maps = images.contiguous(memory_format=torch.channels_last), []
        for index, layer in enumerate(self.layers):
            x = layer(x)
            if index in self.map_ends:
                maps.append(x)
        return x, tuple(maps)

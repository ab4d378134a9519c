"""ResNet features, as the official encoder has them (arXiv 1512.03385, stride in the 3x3 convolution).

Reference: google-research/pix2seq, `architectures/resnet.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Depth: whether blocks are bottlenecks, and how many each of the four stages has.
LAYOUTS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
    200: (True, (3, 24, 36, 3)),
}
EXPANSION = 4  # output channels of a bottleneck for each of its inner ones


class ConvNorm(nn.Module):
    """A convolution without bias, padded to keep its size at stride 1, and batch normalisation."""

    def __init__(self, width_in: int, width_out: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width_in, width_out, kernel, stride=stride, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(width_out, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride), rounded up."""
        return self.norm(self.conv(x))


class ResidualBlock(nn.Module):
    """Convolutions around a shortcut: two of 3x3, or 1x1, 3x3 and 1x1 in a bottleneck."""

    def __init__(
        self, width_in: int, width: int, *, stride: int = 1, bottleneck: bool = False, projection: bool = False
    ) -> None:
        """`width` is that of the inner convolutions; a `projection` fits the shortcut to the output."""
        super().__init__()
        if bottleneck:
            sizes = [(width_in, width, 1, 1), (width, width, 3, stride), (width, EXPANSION * width, 1, 1)]
        else:
            sizes = [(width_in, width, 3, stride), (width, width, 3, 1)]
        self.convs = nn.ModuleList(ConvNorm(*size) for size in sizes)
        self.width_out = sizes[-1][1]
        self.shortcut = ConvNorm(width_in, self.width_out, 1, stride) if projection else nn.Identity()

    def start_as_shortcut(self) -> None:
        """Let the last norm start at zero, so that a fresh block passes its input through."""
        last = self.convs[-1]
        assert isinstance(last, ConvNorm)
        nn.init.zeros_(last.norm.weight)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, C', H / stride, W / stride), rounded up."""
        y = x
        for index, conv in enumerate(self.convs):
            y = conv(y) if index == 0 else conv(F.relu(y))
        return F.relu(y + self.shortcut(x))


class ResNet(nn.Module):
    """The first three or all four stages of a ResNet, without its classifier."""

    def __init__(self, depth: int, num_stages: int, width: float) -> None:
        """`width` multiplies the usual 64 to 512 inner channels."""
        super().__init__()
        bottleneck, blocks = LAYOUTS[depth]
        widths = [int(64 * 2**stage * width) for stage in range(num_stages)]
        self.stem = ConvNorm(3, widths[0], 7, stride=2)
        channels = widths[0]
        stages = []
        for stage, (inner, num_blocks) in enumerate(zip(widths, blocks, strict=False)):
            layers = []
            for index in range(num_blocks):
                stride = 2 if stage > 0 and index == 0 else 1
                block = ResidualBlock(channels, inner, stride=stride, bottleneck=bottleneck, projection=index == 0)
                layers.append(block)
                channels = block.width_out
            stages.append(nn.Sequential(*layers))
        self.stages = nn.Sequential(*stages)
        self.width_out = channels
        self.stride = 2 ** (num_stages + 1)

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, width_out, H / stride, W / stride), rounded up."""
        x = F.relu(self.stem(images.contiguous(memory_format=torch.channels_last)))
        # TensorFlow's `SAME`: an even side is padded at its end alone.
        pad_y, pad_x = (1 - side % 2 for side in x.shape[-2:])
        x = F.pad(x, (1 - pad_x, 1, 1 - pad_y, 1), value=-torch.inf)
        return self.stages(F.max_pool2d(x, 3, stride=2))

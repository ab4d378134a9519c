"""A ResNet as in the official encoder (arXiv 1512.03385, stride in the 3x3 convolution), and a ViT on its features.

Reference: google-research/pix2seq, `architectures/resnet.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.errors import InputError
from pix2seq.model.encoders.convolutions import ConvNorm, ResidualBlock
from pix2seq.model.encoders.vit import VisionTransformer

# Depth: (whether blocks are bottlenecks, number of blocks in each of four stages).
LAYOUTS = {
    18: (False, (2, 2, 2, 2)),
    34: (False, (3, 4, 6, 3)),
    50: (True, (3, 4, 6, 3)),
    101: (True, (3, 4, 23, 3)),
    152: (True, (3, 8, 36, 3)),
    200: (True, (3, 24, 36, 3)),
}


class ResNetTransformer(VisionTransformer):
    """A Vision Transformer on the last feature map of a ResNet, at stride 32, or 16 for three stages."""

    def __init__(self, depth: int, num_stages: int, width: float, *, dim: int, dropout: float, **transformer: Any):
        """See `VisionTransformer` for its arguments. Raises `InputError` for an unknown depth or number of stages."""
        if depth not in LAYOUTS or num_stages not in (3, 4):
            raise InputError(
                f"there is no ResNet-{depth} with {num_stages} stages; "
                f"resnet_depth must be one of {', '.join(map(str, LAYOUTS))}, and resnet_stages 3 or 4"
            )
        resnet = ResNet(depth, num_stages, width)
        stem = nn.Sequential(resnet, nn.Dropout(dropout), nn.Conv2d(resnet.width_out, dim, 1))
        super().__init__(stem, resnet.stride, dim=dim, dropout=dropout, **transformer)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Return the rows and columns of the features of an image, rounded up."""
        return -(-height // self.stride), -(-width // self.stride)


class ResNet(nn.Module):
    """The first three or all four stages of a ResNet, without the classifier."""

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
        # TensorFlow's `SAME` pads an even side only at its end.
        pad_y, pad_x = (1 - side % 2 for side in x.shape[-2:])
        x = F.pad(x, (1 - pad_x, 1, 1 - pad_y, 1), value=-torch.inf)
        return self.stages(F.max_pool2d(x, 3, stride=2))

"""Image encoders: (B, 3, H, W) to features (B, N, D) and the grid (rows, columns) they lie on.

`VisionTransformer` has the official patch stem, or a convolutional one that learns faster from
scratch; `ResNetTransformer` is the official one on ResNet features; `TimmEncoder` is any ViT or CNN of
timm by name. Each owns the normalisation of its input: images come in as [0, 1].

Reference: google-research/pix2seq, `architectures/transformers.py`.
"""

from __future__ import annotations

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from pix2seq.errors import InputError, unknown_name
from pix2seq.model.layers import NORM_EPS, EncoderBlock, LayerStack, attend, init_weights
from pix2seq.model.positions import GridPositions, PositionKind
from pix2seq.model.resnet import LAYOUTS, ResidualBlock, ResNet


class Encoder(nn.Module, ABC):
    """What the joined model needs of an encoder."""

    dim: int  # width of the features
    stride: int  # pixels from one feature to the next

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of features of an image; what is left of a stride is cut off."""
        return height // self.stride, width // self.stride

    @abstractmethod
    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, 3, H, W) in [0, 1] to features (B, N, dim) and the grid of N places."""

    @abstractmethod
    @abstractmethod
    def units(self) -> list[nn.Module]:
        """Parts of about equal size, such as blocks, that are compiled and sharded one by one."""

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """See `Pix2Seq.set_activation_checkpointing`."""


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
                layers += [ResidualBlock(width_out, width_out) for _ in range(num_blocks)]
        self.layers = nn.Sequential(*layers, nn.Conv2d(widths[-1], dim, 1))

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) to (B, dim, H / patch, W / patch)."""
        return self.layers(images.contiguous(memory_format=torch.channels_last))


class VisionTransformer(Encoder):
    """A pre-norm ViT; with fixed positions at home on any rectangle of patches."""

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
    ) -> None:
        """`stem` maps images to (B, dim, H / stride, W / stride); learned positions are for `image_size`."""
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
        self.apply(init_weights)
        for module in self.modules():
            if isinstance(module, ResidualBlock):
                module.start_as_shortcut()

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Images (B, 3, H, W) in [0, 1] to features (B, N, dim), the class token first, and the grid."""
        features = self.stem(images)
        grid = (features.shape[-2], features.shape[-1])
        x = self.stem_norm(features.flatten(2).transpose(1, 2))
        x = x + self.positions(*grid).to(x)
        if self.class_token is not None:
            x = torch.cat([self.class_token.to(x).expand(len(x), -1, -1), x], dim=1)
        return self.norm(self.blocks.run(x)), grid

    def units(self) -> list[nn.Module]:
        """The Transformer's blocks."""
        return list(self.blocks)

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """For the Transformer's blocks; convolutions in front keep what they compute."""
        self.blocks.checkpointing = enabled


class ResNetTransformer(VisionTransformer):
    """The same Transformer on the last feature map of a ResNet, at stride 32, or 16 for three stages."""

    def __init__(self, depth: int, num_stages: int, width: float, *, dim: int, dropout: float, **transformer: Any):
        """For the rest, see `VisionTransformer`. Raises `InputError` for a depth that is none."""
        if depth not in LAYOUTS or num_stages not in (3, 4):
            raise InputError(
                f"there is no ResNet-{depth} with {num_stages} stages; "
                f"resnet_depth is one of {', '.join(map(str, LAYOUTS))} and resnet_stages 3 or 4"
            )
        resnet = ResNet(depth, num_stages, width)
        stem = nn.Sequential(resnet, nn.Dropout(dropout), nn.Conv2d(resnet.width_out, dim, 1))
        super().__init__(stem, resnet.stride, dim=dim, dropout=dropout, **transformer)

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns; what is left of a stride counts."""
        return -(-height // self.stride), -(-width // self.stride)


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
        import timm  # takes seconds, and our own encoders do without

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
        for module in self.net.modules():
            if getattr(module, "fused_attn", False):
                # Classes are hashable; mypy looks at the hash of their instances.
                module.__class__ = _with_attend(type(module))  # type: ignore[arg-type]
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

    def units(self) -> list[nn.Module]:
        """A ViT's blocks, or a CNN as a whole."""
        return list(self.net.blocks) if self.is_vit else [self.net]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """For a ViT. A CNN is left as it is: run twice, its batch norms would count every batch twice."""
        if self.is_vit:
            self.net.set_grad_checkpointing(enabled)


class _AttendMode(TorchFunctionMode):
    """Attention asked of PyTorch goes to `attend`, where it can."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention and len(args) == 3 and not any(kwargs.values()):
            return attend(*args)
        return func(*args, **kwargs)


class _WithAttend:
    """Mixed into timm's attention classes, all of which call PyTorch's fused attention."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        forward: Callable[..., Tensor] = super().forward  # type: ignore[misc]
        # A GPU's kernels need no help, and looking at every call costs time.
        if x.device.type != "cpu":
            return forward(x, *args, **kwargs)
        with _AttendMode():
            return forward(x, *args, **kwargs)


@cache
def _with_attend(attention: type) -> type:
    # A class, not a `forward` set on the module: that would stay bound to the original in a copy.
    return type(attention.__name__, (_WithAttend, attention), {})


def _is_plain_vit(name: str) -> bool:
    """Whether timm's model gives tokens and resizes its positions; told without allocating weights."""
    import timm

    with torch.device("meta"):
        net = timm.create_model(name)
    constructors = [cls.__dict__["__init__"] for cls in type(net).__mro__ if "__init__" in cls.__dict__]
    resizes = any("dynamic_img_size" in inspect.signature(c).parameters for c in constructors if inspect.isfunction(c))
    return resizes and hasattr(net, "num_prefix_tokens")

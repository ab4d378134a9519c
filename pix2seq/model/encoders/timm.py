"""An encoder from any ViT or CNN of timm."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from pix2seq.errors import InputError, unknown_name
from pix2seq.model.encoders.encoder import Encoder
from pix2seq.model.encoders.timm_attention import use_fast_attention


class TimmEncoder(Encoder):
    """A timm model without its head. Features are a ViT's patch tokens or a CNN's last feature map."""

    net: Any  # timm has hundreds of model classes
    mean: Tensor
    std: Tensor

    def __init__(
        self, name: str, *, image_size: tuple[int, int], pretrained: bool = False, drop_path: float = 0.0
    ) -> None:
        """Raises `InputError` if the name is unknown or pretrained weights cannot be loaded."""
        super().__init__()
        import timm  # takes seconds, and our own encoders do not need it

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
        use_fast_attention(self.net)
        config = timm.get_pretrained_cfg(name)
        assert config is not None  # every registered model has one
        self.register_buffer("mean", torch.tensor(config.mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config.std).view(1, 3, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Encode images (B, 3, H, W) in [0, 1] as features (B, N, dim). Also return their grid."""
        height, width = images.shape[-2:]
        images = (images - self.mean) / self.std
        if self.is_vit:
            tokens = self.net.forward_features(images)[:, self.net.num_prefix_tokens :]
            return tokens, (height // self.stride, width // self.stride)
        features = self.net(images)[-1]
        if self.channels_last:
            features = features.permute(0, 3, 1, 2)
        return features.flatten(2).transpose(1, 2), (features.shape[-2], features.shape[-1])

    def block_list(self) -> list[nn.Module]:
        """Return the blocks of a ViT, or a CNN as one block."""
        return list(self.net.blocks) if self.is_vit else [self.net]

    def set_activation_checkpointing(self, enabled: bool) -> None:
        """Enable it for a ViT only: with recomputation, the batch norms of a CNN would count every batch twice."""
        if self.is_vit:
            self.net.set_grad_checkpointing(enabled)


def _is_plain_vit(name: str) -> bool:
    """Return whether a timm model outputs tokens and resizes its position embeddings, without allocating weights."""
    import timm

    with torch.device("meta"):
        net = timm.create_model(name)
    constructors = [cls.__dict__["__init__"] for cls in type(net).__mro__ if "__init__" in cls.__dict__]
    resizes = any("dynamic_img_size" in inspect.signature(c).parameters for c in constructors if inspect.isfunction(c))
    return resizes and hasattr(net, "num_prefix_tokens")

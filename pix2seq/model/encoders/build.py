"""Building an encoder from its settings."""

from __future__ import annotations

import hashlib
from dataclasses import asdict
from typing import Any

from torch import nn

from pix2seq.errors import InputError
from pix2seq.model.config import EncoderConfig
from pix2seq.model.encoders.convolutions import ConvStem
from pix2seq.model.encoders.encoder import Encoder
from pix2seq.model.encoders.resnet import ResNetTransformer
from pix2seq.model.encoders.timm import TimmEncoder
from pix2seq.model.encoders.vit import VisionTransformer
from pix2seq.model.positions import PositionKind


def build_encoder(
    config: EncoderConfig, image_size: tuple[int, int], positions: PositionKind, *, load_pretrained: bool
) -> Encoder:
    """Build the encoder that `config.name` names."""
    if config.closeups and config.name != "vit":
        raise InputError(f"model.encoder.closeups needs the encoder vit with a conv stem, got {config.name}")
    if config.name not in ("vit", "resnet"):
        return TimmEncoder(
            config.name,
            image_size=image_size,
            pretrained=config.pretrained and load_pretrained,
            drop_path=config.drop_path,
        )
    transformer: dict[str, Any] = {
        "image_size": image_size,
        "dim": config.dim,
        "num_layers": config.num_layers,
        "num_heads": config.num_heads,
        "mlp_dim": config.mlp_dim,
        "class_token": config.class_token,
        "positions": positions,
        "dropout": config.dropout,
        "drop_path": config.drop_path,
    }
    if config.name == "resnet":
        return ResNetTransformer(config.resnet_depth, config.resnet_stages, config.resnet_width, **transformer)
    if config.stem == "patch":
        stem: nn.Module = nn.Conv2d(3, config.dim, config.patch_size, stride=config.patch_size)
    else:
        stem = ConvStem(config.dim, config.patch_size, config.stem_blocks)
    return VisionTransformer(stem, config.patch_size, closeups=config.closeups, colour=config.colour, **transformer)


def encoder_fingerprint(encoder: Encoder, config: EncoderConfig, positions: str) -> str:
    """Return the sha256 of what an encoder computes in evaluation mode: its weights and architecture."""
    known: dict[str, Any] = {"name": config.name}
    if config.name in ("vit", "resnet"):  # a timm model has no other settings that matter
        known = asdict(config) | {"positions": positions, "pretrained": False, "dropout": 0, "drop_path": 0}
    digest = hashlib.sha256(repr(sorted(known.items())).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.cpu().numpy().tobytes())
    return digest.hexdigest()

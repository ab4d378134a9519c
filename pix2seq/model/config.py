"""The settings that make a model, saved with it in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from pix2seq.vocab import Vocab


@dataclass(frozen=True)
class EncoderConfig:
    """`name` is a timm model, or `vit` for our own Vision Transformer; sizes below are for `vit`."""

    name: str = "deit_small_patch16_224"
    pretrained: bool = False  # timm's weights, downloaded where the network allows
    dim: int = 192
    num_layers: int = 6
    num_heads: int = 3
    mlp_dim: int = 768
    patch_size: int = 16  # pixels
    stem: str = "patch"  # patch: one convolution, as published; conv: strided 3x3 convolutions
    stem_blocks: int = 0  # residual blocks after each convolution of a conv stem but the first
    dropout: float = 0.0  # on hidden units of feed-forward layers
    drop_path: float = 0.1  # probability to skip a residual branch, for timm models too


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; memory is projected to `dim`."""

    dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    mlp_dim: int = 1024
    max_seq_len: int = 512  # tokens, prompt included
    dropout: float = 0.1
    drop_path: float = 0.1


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `build_model` needs."""

    image_size: tuple[int, int] = (640, 640)  # height, width in pixels the model is trained and used at
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    positions: str = "fourier"  # codes of places: fourier, or sincos as published; see model/positions.py
    vocab: Vocab = field(default_factory=Vocab)

"""The settings that make a model, saved with it in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from pix2seq.vocab import Vocab


@dataclass(frozen=True)
class EncoderConfig:
    """`name` is a timm model, `vit` for our Vision Transformer, or `resnet` for one on ResNet features.

    Sizes below are for `vit` and `resnet`; a timm model has its own.
    """

    name: str = "deit_small_patch16_224"
    pretrained: bool = False  # timm's weights, downloaded where the network allows
    dim: int = 192
    num_layers: int = 6
    num_heads: int = 3
    mlp_dim: int = 768
    class_token: bool = False  # a learned token in front of the patches
    patch_size: int = 16  # pixels; of `vit`
    stem: str = "patch"  # of `vit`: patch, one convolution as published; conv, strided 3x3 convolutions
    stem_blocks: int = 0  # residual blocks after each convolution of a conv stem but the first
    resnet_depth: int = 50  # of `resnet`: 18, 34, 50, 101, 152 or 200
    resnet_stages: int = 4  # of `resnet`: 4, at stride 32; 3, at stride 16 (C4)
    resnet_width: float = 1.0  # of `resnet`: channels as a multiple of the usual ones
    dropout: float = 0.0  # on hidden units of feed-forward layers
    drop_path: float = 0.1  # probability to skip a residual branch, for timm models too


@dataclass(frozen=True)
class MemoryConfig:
    """From encoder features to what the decoder attends to; the official `dec_proj_mode` in parts."""

    positions: bool = True  # add the places of features again (official `linear_p` and `mlp`)
    mlp: bool = True  # then a feed-forward layer (official `mlp`)
    mlp_dim: int | None = None  # its hidden units; none given: as many as the decoder's


@dataclass(frozen=True)
class DecoderConfig:
    """Sizes of the decoder; memory is projected to `dim`."""

    dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    mlp_dim: int = 1024
    max_seq_len: int = 512  # tokens, prompt included
    positions: str = "learned"  # of tokens in the sequence: learned or sincos
    tied_embedding: bool = True  # the output layer is the input embedding, transposed
    output_bias: bool = True
    dropout: float = 0.1
    drop_path: float = 0.1


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `build_model` needs."""

    image_size: tuple[int, int] = (640, 640)  # height, width in pixels the model is trained and used at
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    positions: str = "fourier"  # codes of places: fourier, sincos as published, or learned; see model/positions.py
    vocab: Vocab = field(default_factory=Vocab)

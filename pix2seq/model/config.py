"""Settings of a model, saved with its weights in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field

from pix2seq.vocab import Vocab


@dataclass(frozen=True)
class EncoderConfig:
    """Settings of the encoder: a timm model, our Vision Transformer (`vit`), or one on ResNet features (`resnet`).

    The sizes apply to `vit` and `resnet`; a timm model has its own.
    """

    name: str = "deit_small_patch16_224"
    pretrained: bool = False  # timm's weights, downloaded if needed
    dim: int = 192
    num_layers: int = 6
    num_heads: int = 3
    mlp_dim: int = 768
    class_token: bool = False  # put a learned token in front of the patches
    patch_size: int = 16  # pixels; only `vit`
    stem: str = "patch"  # only `vit`: patch (one convolution, as published) or conv (strided 3x3 convolutions)
    stem_blocks: int = 0  # residual blocks after each convolution of a conv stem, except the first
    closeups: bool = False  # make memories of single objects from the finer maps of a conv stem; only `vit`
    resnet_depth: int = 50  # only `resnet`: 18, 34, 50, 101, 152 or 200
    resnet_stages: int = 4  # only `resnet`: 4 (stride 32) or 3 (stride 16, C4)
    resnet_width: float = 1.0  # only `resnet`: multiplies the usual number of channels
    dropout: float = 0.0  # in feed-forward layers
    drop_path: float = 0.1  # probability of skipping a residual branch, also in timm models


@dataclass(frozen=True)
class MemoryConfig:
    """Settings of the projection from encoder features to memory; the official `dec_proj_mode`, split in two."""

    positions: bool = True  # add 2D position encodings again (official `linear_p` and `mlp`)
    mlp: bool = True  # add a feed-forward layer (official `mlp`)
    mlp_dim: int | None = None  # hidden width of that layer; None: the decoder's


@dataclass(frozen=True)
class DecoderConfig:
    """Settings of the decoder. Memory is projected to its `dim`."""

    dim: int = 256
    num_layers: int = 6
    num_heads: int = 8
    mlp_dim: int = 1024
    max_seq_len: int = 512  # tokens, including the prompt
    positions: str = "learned"  # of tokens in a sequence: learned or sincos
    tied_embedding: bool = True  # use the token embedding as the output layer
    output_bias: bool = True
    dropout: float = 0.1
    drop_path: float = 0.1


@dataclass(frozen=True)
class ModelConfig:
    """Everything that `build_model` needs."""

    image_size: tuple[int, int] = (640, 640)  # height and width of the input in pixels
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    positions: str = "fourier"  # of image features: fourier, sincos (as published) or learned; see model/positions.py
    vocab: Vocab = field(default_factory=Vocab)

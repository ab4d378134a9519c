"""Settings of a model, saved with its weights in config.json."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from pix2seq.model.positions import PositionKind
from pix2seq.settings import Range, Settings, ShareBelowOne
from pix2seq.vocab import Vocab

Side = Annotated[int, Range(least=1, most=8192)]  # of an image, in pixels
Width = Annotated[int, Range(least=1, most=65_536)]  # of a layer
OWN_ENCODERS = ("vit", "resnet")
CONV_PATCHES = (4, 8, 16, 32)
Layers = Annotated[int, Range(least=1, most=256)]


@dataclass(frozen=True)
class EncoderConfig(Settings):
    """Settings of the encoder: a timm model, our Vision Transformer (`vit`), or one on ResNet features (`resnet`).

    The sizes apply to `vit` and `resnet`; a timm model has its own.
    """

    section = "model.encoder"

    name: str = "deit_small_patch16_224"
    pretrained: bool = False  # timm's weights, downloaded if needed
    dim: Width = 192
    num_layers: Layers = 6
    num_heads: Width = 3
    mlp_dim: Width = 768
    class_token: bool = False  # put a learned token in front of the patches
    patch_size: Side = 16  # pixels; only `vit`
    stem: Literal["patch", "conv"] = "patch"  # only `vit`: one convolution, as published, or strided 3x3 convolutions
    # Residual blocks after each convolution of a conv stem, except the first.
    stem_blocks: Annotated[int, Range(least=0, most=256)] = 0
    closeups: bool = False  # make memories of single objects from the finer maps of a conv stem; only `vit`
    # Add the mean colour of each patch to its feature, by weights that start at zero; only `vit`.
    colour: bool = False
    resnet_depth: Literal[18, 34, 50, 101, 152, 200] = 50  # only `resnet`
    resnet_stages: Literal[3, 4] = 4  # only `resnet`: 4 (stride 32) or 3 (stride 16, C4)
    resnet_width: Annotated[float, Range(above=0, most=64)] = 1.0  # only `resnet`: multiplies the number of channels
    dropout: ShareBelowOne = 0.0  # in feed-forward layers
    drop_path: ShareBelowOne = 0.1  # probability of skipping a residual branch, also in timm models

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.name in OWN_ENCODERS:  # a timm model has its own sizes
            check_heads(self.section, self.dim, self.num_heads)
        if self.colour and self.name != "vit":
            raise ValueError(f"model.encoder.colour needs the encoder vit, got {self.name}")
        if self.name == "vit" and self.stem == "conv" and self.patch_size not in CONV_PATCHES:
            raise ValueError(f"model.encoder.stem=conv needs a patch_size of 4, 8, 16 or 32, got {self.patch_size}")


@dataclass(frozen=True)
class MemoryConfig(Settings):
    """Settings of the projection from encoder features to memory; the official `dec_proj_mode`, split in two."""

    section = "model.memory"

    positions: bool = True  # add 2D position encodings again (official `linear_p` and `mlp`)
    mlp: bool = True  # add a feed-forward layer (official `mlp`)
    mlp_dim: Width | None = None  # hidden width of that layer; None: the decoder's
    # Images that a sequence can read beside its own, each with a learned embedding of its place; not in the official
    # models.
    references: Annotated[int, Range(least=0, most=64)] = 0


@dataclass(frozen=True)
class DecoderConfig(Settings):
    """Settings of the decoder. Memory is projected to its `dim`."""

    section = "model.decoder"

    dim: Width = 256
    num_layers: Layers = 6
    num_heads: Width = 8
    mlp_dim: Width = 1024
    max_seq_len: Annotated[int, Range(least=1, most=65_536)] = 512  # tokens, including the prompt
    positions: Literal["learned", "sincos"] = "learned"  # of tokens in a sequence
    tied_embedding: bool = True  # use the token embedding as the output layer
    output_bias: bool = True
    dropout: ShareBelowOne = 0.1
    drop_path: ShareBelowOne = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_heads(self.section, self.dim, self.num_heads)


@dataclass(frozen=True)
class ContrastConfig(Settings):
    """Settings of the embeddings by which images and sentences are compared."""

    section = "model.contrast"

    dim: Width = 128  # of an embedding


@dataclass(frozen=True)
class ModelConfig(Settings):
    """Everything that `build_model` needs."""

    section = "model"

    image_size: tuple[Side, Side] = (640, 640)  # height and width of the input in pixels
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    decoder: DecoderConfig = field(default_factory=DecoderConfig)
    positions: PositionKind = "fourier"  # of image features; see model/positions.py
    vocab: Vocab = field(default_factory=Vocab)
    contrast: ContrastConfig | None = None  # None: the model makes no embeddings

    def __post_init__(self) -> None:
        super().__post_init__()
        parts: list[EncoderConfig | DecoderConfig] = [self.decoder]
        if self.encoder.name in OWN_ENCODERS:
            parts.append(self.encoder)
        for part in parts:
            if part.dim % 4 and not self.positions == self.decoder.positions == "learned":
                raise ValueError(
                    f"{part.section}.dim must be a multiple of 4, for sines and cosines of positions on two axes, got "
                    f"{part.dim}"
                )


def check_heads(section: str, dim: int, num_heads: int) -> None:
    """Raise `ValueError` if attention cannot split `dim` into equal heads."""
    if dim % num_heads:
        raise ValueError(f"{section}.dim={dim} does not divide into num_heads={num_heads}; make it a multiple")

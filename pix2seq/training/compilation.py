"""torch.compile for a model in training."""

from __future__ import annotations

import os
import shutil

from torch import nn

from pix2seq.errors import InputError
from pix2seq.model.encoder import TimmEncoder
from pix2seq.model.pix2seq import Pix2Seq


def compile_model(model: Pix2Seq) -> None:
    """Compile the Transformer blocks of encoder and decoder, or a timm CNN as a whole, where they are.

    Names of weights stay, and so do generation and evaluation, which call other methods. Compiling
    happens at the first step. Raises `InputError` where a model on the CPU finds no C++ compiler.
    """
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if model.device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        raise InputError("compile=true found no C++ compiler, which the CPU needs; install g++, or leave compile out")
    for block in [*_encoder_blocks(model), *model.decoder.blocks]:
        block.compile()


def _encoder_blocks(model: Pix2Seq) -> list[nn.Module]:
    encoder = model.encoder
    if isinstance(encoder, TimmEncoder):
        return list(encoder.net.blocks) if encoder.is_vit else [encoder.net]
    blocks = encoder.blocks
    assert isinstance(blocks, nn.ModuleList)
    return list(blocks)

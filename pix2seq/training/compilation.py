"""torch.compile for a model in training."""

from __future__ import annotations

import os
import shutil

from pix2seq.errors import InputError
from pix2seq.model.pix2seq import Pix2Seq


def compile_model(model: Pix2Seq) -> None:
    """Compile the blocks of encoder and decoder where they are.

    Names of weights stay, and so do generation and evaluation, which call other methods. Compiling
    happens at the first step. Raises `InputError` where a model on the CPU finds no C++ compiler.
    """
    compilers = (os.environ.get("CXX"), "c++", "g++", "clang++")
    if model.device.type == "cpu" and not any(name and shutil.which(name) for name in compilers):
        raise InputError("compile=true found no C++ compiler, which the CPU needs; install g++, or leave compile out")
    import torch._dynamo  # takes seconds

    blocks = model.block_list()
    # Blocks that differ in a number, such as timm's in their drop rates, are variants of one function, and beyond
    # the limit the rest would silently stay as they are.
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 4 * len(blocks))
    for block in blocks:
        block.compile()

"""The parts of a model that become ONNX graphs: encoder, closeups, and the decoder's prefill and step.

Keys and values are inputs and outputs, so that whoever runs the graphs holds the cache and decides which rows stay.

Shapes: B memories, I rows that read the same memory, R = B * I rows, P prompt tokens, t cached tokens, H heads, d head
width, N memory tokens, D width, V vocabulary size, C channels of a map, F frames.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.model.closeups import frame_points
from pix2seq.model.decoder import Decoder, DecoderBlock
from pix2seq.model.layers import attend, merge_heads
from pix2seq.model.pix2seq import Pix2Seq

Layers = list[Tensor]  # one tensor of each layer


class EncoderGraph(nn.Module):
    """Images to memory, and to the maps that closeups are made of."""

    def __init__(self, model: Pix2Seq) -> None:
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Images (B, 3, H, W) in [0, 1], of the config's size, to memory (B, N, D) and maps (B, C, h, w)."""
        memory, maps = self.model.encode_with_maps(images)
        return memory, *maps


class CloseupGraph(nn.Module):
    """Frames within one image to memories. All are sampled in one call, one above the other, without copies of maps."""

    def __init__(self, model: Pix2Seq) -> None:
        super().__init__()
        self.model = model
        self.grid = model.encoder.grid(*model.config.image_size)

    def forward(self, frames: Tensor, maps: Layers) -> Tensor:
        """Frames (F, 4), `yxyx` in [0, 1] of the image, and its maps (1, C, h, w) to memories (F, N, D)."""
        points = frame_points(frames, self.grid)
        num_frames, rows, columns, _ = points.shape
        column = points.reshape(1, num_frames * rows, columns, 2)
        sampled = torch.cat([F.grid_sample(each, column, align_corners=False) for each in maps], dim=1)
        sampled = sampled.reshape(-1, num_frames, rows, columns).transpose(0, 1)
        return self.model.projection(self.model.encoder.look_closer(sampled), self.grid)


class PrefillGraph(nn.Module):
    """Prompts to logits and a new cache."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, tokens: Tensor, memory: Tensor) -> tuple[Tensor, Layers, Layers, Layers, Layers]:
        """Prompts (B, I, P) on memory (B, N, D) to logits (R, V) after them and keys and values of each layer.

        Those of tokens are (B, I, H, P, d), those of memory (B, H, N, d).
        """
        decoder, sides = self.decoder, tokens.shape[:2]
        x = decoder.token_embedding(tokens.flatten(0, 1)) + decoder.position_embedding[: tokens.shape[2]]
        keys, values, memory_keys, memory_values = [], [], [], []
        for block in decoder.blocks:
            q, k, v = block.self_attention.project(block.self_norm(x))
            x = x + block.self_attention.out(merge_heads(attend(q, k, v, is_causal=True)))
            of_memory = block.cross_attention.project_memory(memory)
            x = _read_memory(block, x, *of_memory)
            keys.append(k.unflatten(0, sides))
            values.append(v.unflatten(0, sides))
            memory_keys.append(of_memory[0])
            memory_values.append(of_memory[1])
        return _last_logits(decoder, x), keys, values, memory_keys, memory_values


class StepGraph(nn.Module):
    """One token of every row, and the cache, to logits and longer keys and values."""

    def __init__(self, decoder: Decoder) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(
        self, tokens: Tensor, position: Tensor, keys: Layers, values: Layers, memory_keys: Layers, memory_values: Layers
    ) -> tuple[Tensor, Layers, Layers]:
        """Tokens (B, I, 1) at a position (1,), which is t, to logits (R, V) and keys and values (B, I, H, t + 1, d)."""
        decoder, sides = self.decoder, tokens.shape[:2]
        x = decoder.token_embedding(tokens.flatten(0, 1)) + F.embedding(position, decoder.position_embedding)
        longer_keys, longer_values = [], []
        for i, block in enumerate(decoder.blocks):
            q, k, v = block.self_attention.project(block.self_norm(x))
            k = torch.cat([keys[i].flatten(0, 1), k], dim=2)
            v = torch.cat([values[i].flatten(0, 1), v], dim=2)
            x = x + block.self_attention.out(merge_heads(attend(q, k, v)))
            x = _read_memory(block, x, memory_keys[i], memory_values[i])
            longer_keys.append(k.unflatten(0, sides))
            longer_values.append(v.unflatten(0, sides))
        return _last_logits(decoder, x), longer_keys, longer_values


def _read_memory(block: DecoderBlock, x: Tensor, memory_keys: Tensor, memory_values: Tensor) -> Tensor:
    """The rest of a block after self-attention."""
    x = x + block.cross_attention(block.cross_norm(x), memory_keys, memory_values)
    return x + block.mlp(block.mlp_norm(x))


def _last_logits(decoder: Decoder, x: Tensor) -> Tensor:
    return decoder.logits(decoder.norm(x[:, -1]))

"""A decoder step on the CPU: one token per row, with as little as possible around the matrix products.

With one token per row, a step reads every weight for a few products, so its time is the time to read memory plus
the overhead of each operation. So weights are packed once per generation for the number of rows, two-dimensional
matrix products replace modules, and there are no masks, because a new token sees all cached tokens.

Shapes: B images, G rows per image, R = B * G rows, H heads, d head width, D = H * d, S slots, N memory
tokens, V vocabulary size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.model.decoding.kv_cache import KVCache, LayerCache
from pix2seq.model.layers import Float32Norm

if TYPE_CHECKING:
    from pix2seq.model.decoder import Decoder, DecoderBlock

Linear = Callable[[Tensor], Tensor]

# MKL is faster with packed weights from so many rows, and if so many steps make up for packing them.
MIN_PACKED_ROWS = 4
MIN_PACKED_STEPS = 16
# Number of multiplications from which oneDNN's bf16 is faster than float32, as it takes 15 us longer to start.
# Fewer than 8 rows count as 8, because their time is that of reading the matrix.
MIN_BF16_WORK = 2**22


def pack_linear(
    weight: Tensor, bias: Tensor | None, *, num_rows: int, bf16: bool, packs: bool, gelu: bool = False
) -> Linear:
    """Return a function from x (R, in) to (R, out) for `weight` (out, in); if it `packs`, for about `num_rows` rows.

    With `bf16`, it computes in bfloat16 if that is faster than float32. Its result may have either type. `gelu`
    adds an exact GELU.
    """
    if bf16 and _can_pack() and weight.numel() * max(num_rows, 8) >= MIN_BF16_WORK:
        packed = torch.ops.mkldnn._reorder_linear_weight(weight.bfloat16(), num_rows)
        packed_bias = None if bias is None else bias.bfloat16()
        name, variant = ("gelu", "none") if gelu else ("none", "")
        return lambda x: torch.ops.mkldnn._linear_pointwise(x.bfloat16(), packed, packed_bias, name, [], variant)
    weight = weight.float()
    bias = None if bias is None else bias.float()
    if packs and _can_pack():
        packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, num_rows)
        linear: Linear = lambda x: torch.ops.mkl._mkl_linear(x.float(), packed, weight, bias, num_rows)  # noqa: E731
    else:
        linear = lambda x: F.linear(x.float(), weight, bias)  # noqa: E731
    return (lambda x: F.gelu(linear(x))) if gelu else linear


class CpuStep:
    """A step with the decoder's weights packed for the number of rows of one cache. Residuals are float32."""

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        bf16 = cache.dtype == torch.bfloat16
        self.num_rows = cache.num_rows
        packs = self.num_rows >= MIN_PACKED_ROWS and cache.num_slots - cache.length >= MIN_PACKED_STEPS
        self.tokens = decoder.token_embedding.weight
        self.positions = decoder.position_embedding
        self.norm = Float32Norm.of(decoder.norm)
        self.layers = [
            Layer.of(block, layer, num_rows=self.num_rows, bf16=bf16, packs=packs)
            for block, layer in zip(decoder.blocks, cache.layers, strict=True)
        ]
        self.output_weight, self.output_bias = decoder.output_weight, decoder.output_bias
        self.output = pack_linear(self.output_weight, self.output_bias, num_rows=self.num_rows, bf16=bf16, packs=packs)

    def hidden(self, tokens: Tensor, position: int) -> Tensor:
        """Add `tokens` (R,) to the cache at `position`, and return the hidden states (R, D) after them."""
        x = F.embedding(tokens, self.tokens).float()
        x += self.positions[position]
        for layer in self.layers:
            x += layer.attend_to_tokens(layer.self_norm(x), position)
            x += layer.attend_to_memory(layer.cross_norm(x))
            x += layer.contract(layer.expand(layer.mlp_norm(x)))
        return self.norm(x)

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        """Map hidden states (R, D) to logits (R, V), or only to those of `ids`."""
        if ids is None:
            return self.output(hidden)
        bias = None if self.output_bias is None else self.output_bias[ids]
        return F.linear(hidden.to(self.output_weight), self.output_weight[ids], bias)


@dataclass(frozen=True)
class Layer:
    """A block with packed weights, and views of its cache with rows (or images) and heads in one dimension."""

    self_norm: Float32Norm
    qkv: Linear
    self_out: Linear
    cross_norm: Float32Norm
    query: Linear
    cross_out: Linear
    mlp_norm: Float32Norm
    expand: Linear  # including the GELU
    contract: Linear
    num_heads: int
    cache: LayerCache
    self_keys: Tensor  # (R * H, S, d)
    self_values: Tensor  # (R * H, S, d)
    memory_keys: Tensor  # (B * H, d, N)
    memory_values: Tensor  # (B * H, N, d)

    @classmethod
    def of(cls, block: DecoderBlock, cache: LayerCache, *, num_rows: int, bf16: bool, packs: bool) -> Layer:
        """Pack the weights of `block`."""

        def pack(linear: nn.Linear, *, gelu: bool = False) -> Linear:
            return pack_linear(linear.weight, linear.bias, num_rows=num_rows, bf16=bf16, packs=packs, gelu=gelu)

        return cls(
            Float32Norm.of(block.self_norm),
            pack(block.self_attention.qkv),
            pack(block.self_attention.out),
            Float32Norm.of(block.cross_norm),
            pack(block.cross_attention.query),
            pack(block.cross_attention.out),
            Float32Norm.of(block.mlp_norm),
            pack(block.mlp.expand, gelu=True),
            pack(block.mlp.contract),
            block.self_attention.num_heads,
            cache,
            cache.self_keys.flatten(0, 1),
            cache.self_values.flatten(0, 1),
            cache.memory_keys.transpose(2, 3).flatten(0, 1),
            cache.memory_values.flatten(0, 1),
        )

    def attend_to_tokens(self, x: Tensor, position: int) -> Tensor:
        """Attend from x (R, D), the tokens at `position`, to all tokens up to these."""
        end = position + 1
        q, k, v = self.qkv(x).view(len(x), 3, self.num_heads, -1).unbind(1)  # each (R, H, d)
        self.cache.self_keys.select(2, position).copy_(k)
        self.cache.self_values.select(2, position).copy_(v)
        if self.self_keys.dtype == torch.bfloat16:
            attended = F.scaled_dot_product_attention(
                q.bfloat16().unsqueeze(2), self.cache.self_keys[:, :, :end], self.cache.self_values[:, :, :end]
            )
            return self.self_out(attended.reshape(x.shape))
        q = q.reshape(-1, 1, q.shape[-1])
        attended = _attend(q, self.self_keys[:, :end].transpose(1, 2), self.self_values[:, :end])
        return self.self_out(attended.view(x.shape))

    def attend_to_memory(self, x: Tensor) -> Tensor:
        """Attend from x (R, D) to memory. The rows of an image are queries side by side."""
        keys, values = self.cache.memory_keys, self.cache.memory_values
        q = self.query(x).view(len(keys), -1, self.num_heads, keys.shape[-1]).transpose(1, 2)  # (B, H, G, d)
        if keys.dtype == torch.bfloat16:
            attended = F.scaled_dot_product_attention(q.bfloat16(), keys, values)
        else:
            attended = _attend(q.flatten(0, 1), self.memory_keys, self.memory_values).view(q.shape)
        return self.cross_out(attended.transpose(1, 2).reshape(x.shape))


def _attend(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend from q (M, G, d) to keys (M, d, N) and values (M, N, d), faster than the fused kernel for few queries."""
    scores = torch.bmm(q * q.shape[-1] ** -0.5, keys)
    return torch.bmm(scores.softmax(-1), values)


def _can_pack() -> bool:
    """Return whether this build of PyTorch has the packed matrix products that torch.compile uses on x86."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()

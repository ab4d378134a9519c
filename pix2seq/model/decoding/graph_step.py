"""A decoder step on a GPU: one token per row, recorded as a CUDA graph and replayed.

A GPU computes a step for a few rows much faster than Python launches its hundred operations. A CUDA graph launches
them all at once, but only on the tensors it was recorded with. So the position is a tensor, which says where to
write new keys and values, and attention runs over all slots, with a mask on those not filled. A graph serves one
cache with a fixed number of rows.

Shapes: B images, G rows per image, R = B * G rows, H heads, d head width, D = H * d, S slots, V vocabulary size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.model.decoding.kv_cache import KVCache, LayerCache
from pix2seq.model.layers import Float32Norm

if TYPE_CHECKING:
    from pix2seq.model.decoder import Decoder, DecoderBlock

WARM_UP_STEPS = 2  # before recording, because libraries initialise themselves at their first call


class GraphStep:
    """A recorded step with the decoder's weights in the type of one cache. Residuals are float32.

    On other devices than a GPU, nothing is recorded, and the same operations run one by one.
    """

    def __init__(self, decoder: Decoder, cache: KVCache) -> None:
        device, dtype = cache.device, cache.dtype
        self.dtype = dtype
        self.tokens = torch.zeros(cache.num_rows, dtype=torch.long, device=device)
        self.position = torch.full((1,), cache.length, dtype=torch.long, device=device)
        self.slots = torch.arange(cache.num_slots, device=device)
        self.embeddings, self.positions = decoder.token_embedding.weight, decoder.position_embedding
        self.layers = [_Layer(block, layer, dtype) for block, layer in zip(decoder.blocks, cache.layers, strict=True)]
        self.norm = Float32Norm.of(decoder.norm)
        self.output = _Linear(decoder.output_weight, decoder.output_bias, dtype)
        for layer in cache.layers:
            # A masked value gets weight 0, but 0 times uninitialised memory may be NaN.
            layer.self_keys[:, :, cache.length :] = 0
            layer.self_values[:, :, cache.length :] = 0
        self.graph = self._record() if device.type == "cuda" else None

    def hidden(self, tokens: Tensor, position: int) -> Tensor:
        """Add `tokens` (R,) to the cache at `position`. Return hidden states (R, D), valid until the next call."""
        self.tokens.copy_(tokens)
        self.position.fill_(position)
        if self.graph is None:
            return self._run()
        self.graph.replay()
        return self.recorded

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        """Map hidden states (R, D) to logits (R, V), or only to those of `ids`."""
        return self.output(hidden, ids)

    def _record(self) -> torch.cuda.CUDAGraph:
        current, other = torch.cuda.current_stream(), torch.cuda.Stream()
        other.wait_stream(current)
        with torch.cuda.stream(other):
            for _ in range(WARM_UP_STEPS):  # the first replay overwrites what these write
                self._run()
        current.wait_stream(other)
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that pin batches during an evaluation, may use the GPU meanwhile.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            self.recorded = self._run()
        return graph

    def _run(self) -> Tensor:
        x = F.embedding(self.tokens, self.embeddings).float() + self.positions.index_select(0, self.position)
        filled = self.slots <= self.position  # (S,)
        mask = torch.zeros_like(filled, dtype=self.dtype).masked_fill(~filled, -torch.inf).view(1, 1, 1, -1)
        for layer in self.layers:
            x = layer(x, self.position, mask)
        return self.norm(x)


class _Linear:
    """A linear layer in the cache's type, for inputs of any type."""

    def __init__(self, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> None:
        self.weight = weight.to(dtype)
        self.bias = None if bias is None else bias.to(dtype)

    @classmethod
    def of(cls, module: nn.Linear, dtype: torch.dtype) -> _Linear:
        """Convert the weights of `module`."""
        return cls(module.weight, module.bias, dtype)

    def __call__(self, x: Tensor, ids: slice | None = None) -> Tensor:
        weight, bias = self.weight, self.bias
        if ids is not None:
            weight, bias = weight[ids], None if bias is None else bias[ids]
        return F.linear(x.to(weight.dtype), weight, bias)


class _Layer:
    """A block and its cache."""

    def __init__(self, block: DecoderBlock, cache: LayerCache, dtype: torch.dtype) -> None:
        self.cache, self.num_heads = cache, block.self_attention.num_heads
        self.self_norm, self.cross_norm, self.mlp_norm = map(
            Float32Norm.of, (block.self_norm, block.cross_norm, block.mlp_norm)
        )
        self.qkv, self.self_out, self.query, self.cross_out, self.expand, self.contract = (
            _Linear.of(linear, dtype)
            for linear in (
                block.self_attention.qkv,
                block.self_attention.out,
                block.cross_attention.query,
                block.cross_attention.out,
                block.mlp.expand,
                block.mlp.contract,
            )
        )

    def __call__(self, x: Tensor, position: Tensor, mask: Tensor) -> Tensor:
        """Process x (R, D), tokens at `position` (1,). `mask` (1, 1, 1, S) is added to the scores."""
        cache = self.cache
        q, k, v = self.qkv(self.self_norm(x)).view(len(x), 3, self.num_heads, 1, -1).unbind(1)  # (R, H, 1, d)
        cache.self_keys.index_copy_(2, position, k)
        cache.self_values.index_copy_(2, position, v)
        attended = F.scaled_dot_product_attention(q, cache.self_keys, cache.self_values, attn_mask=mask)
        x = x + self.self_out(attended.reshape(x.shape))
        keys, values = cache.memory_keys, cache.memory_values
        q = self.query(self.cross_norm(x)).view(len(keys), -1, self.num_heads, keys.shape[-1]).transpose(1, 2)
        attended = F.scaled_dot_product_attention(q, keys, values)  # (B, H, G, d)
        x = x + self.cross_out(attended.transpose(1, 2).reshape(x.shape))
        return x + self.contract(F.gelu(self.expand(self.mlp_norm(x))))

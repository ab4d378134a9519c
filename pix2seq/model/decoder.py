"""The autoregressive decoder: token ids and image memory to hidden states and logits.

Shapes: B images, I sequences per image, R = B * I rows, T tokens, N memory tokens, D width, V vocabulary size.
Row r belongs to image r // I. The rows of an image share its memory without a copy.

Reference: google-research/pix2seq, `architectures/transformers.py` (`AutoregressiveDecoder`).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.model.decoding.kv_cache import KVCache, LayerCache
from pix2seq.model.layers import (
    NORM_EPS,
    DropPath,
    FeedForward,
    LayerStack,
    SelfAttention,
    attend,
    init_weights,
    merge_heads,
    split_heads,
)
from pix2seq.model.packing import Layout
from pix2seq.model.positions import sincos_1d


class CrossAttention(nn.Module):
    """Attention from tokens to memory. Keys and values are projected once per image."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(dim, dim)
        self.key_value = nn.Linear(dim, 2 * dim)
        self.out = nn.Linear(dim, dim)

    @torch.no_grad()
    def init_as_lookup(self) -> None:
        """Initialise queries and keys alike, and values and output as the identity."""
        dim = self.out.in_features
        self.query.weight.copy_(self.key_value.weight[:dim])
        nn.init.eye_(self.key_value.weight[dim:])
        nn.init.eye_(self.out.weight)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Project memory (B, N, D) to keys and values, each (B, H, N, D / H)."""
        keys, values = self.key_value(memory).chunk(2, dim=-1)
        return split_heads(keys, self.num_heads), split_heads(values, self.num_heads)

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """(R, T, D) to (R, T, D), with the keys and values of B images. R is a multiple of B."""
        num_images, num_tokens = keys.shape[0], x.shape[1]
        # There is no mask, so the tokens of all sequences of an image can be queries side by side.
        q = split_heads(self.query(x).reshape(num_images, -1, x.shape[-1]), self.num_heads)
        attended = merge_heads(attend(q, keys, values))
        return self.out(attended.reshape(-1, num_tokens, x.shape[-1]))


class DecoderBlock(nn.Module):
    """Causal self-attention, cross-attention and a feed-forward layer, each pre-norm and residual."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.self_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.self_attention = SelfAttention(dim, num_heads)
        self.cross_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.cross_attention = CrossAttention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, memory: Tensor, layout: Layout | None = None) -> Tensor:
        """Process x (R, T, D) on memory (B, N, D) with teacher forcing, or x (L, D) of sequences in a `layout`."""
        if layout is not None:
            return self._forward_packed(x, memory, layout)
        x = x + self.drop_path(self.self_attention(self.self_norm(x), is_causal=True))
        keys, values = self.cross_attention.project_memory(memory)
        x = x + self.drop_path(self.cross_attention(self.cross_norm(x), keys, values))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))

    def _forward_packed(self, x: Tensor, memory: Tensor, layout: Layout) -> Tensor:
        samples = (layout.image_of_token, len(layout.image_lengths)) if self.drop_path.rate else ()
        own, cross = self.self_attention, self.cross_attention
        x = x + self.drop_path(own.out(layout.self_attention(own.qkv(self.self_norm(x)), own.num_heads)), *samples)
        query, key_value = cross.query(self.cross_norm(x)), cross.key_value(memory)
        x = x + self.drop_path(cross.out(layout.cross_attention(query, key_value, cross.num_heads)), *samples)
        return x + self.drop_path(self.mlp(self.mlp_norm(x)), *samples)

    def step(self, x: Tensor, cache: LayerCache, start: int) -> Tensor:
        """Process new tokens x (R, t, D) at position `start` and add their keys and values to the cache."""
        end = start + x.shape[1]
        q, k, v = self.self_attention.project(self.self_norm(x))
        cache.self_keys[:, :, start:end] = k
        cache.self_values[:, :, start:end] = v
        # New tokens see all cached tokens and the new ones before them. A single token needs no mask, and a prompt
        # at the start a causal one.
        if start == 0:
            attended = attend(q, k, v, is_causal=x.shape[1] > 1)
        elif x.shape[1] == 1:
            attended = attend(q, cache.self_keys[:, :, :end], cache.self_values[:, :, :end])
        else:
            raise ValueError("several tokens at once can only be read at the start of a sequence")
        x = x + self.self_attention.out(merge_heads(attended))
        x = x + self.cross_attention(self.cross_norm(x), cache.memory_keys, cache.memory_values)
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nn.Module):
    """Token and position embeddings, blocks, and an output layer, which may be the token embedding."""

    position_embedding: Tensor  # (S, D)

    def __init__(
        self,
        *,
        vocab_size: int,
        dim: int,
        num_layers: int,
        num_heads: int,
        mlp_dim: int,
        max_seq_len: int,
        learned_positions: bool = True,
        tied_embedding: bool = True,
        output_bias: bool = True,
        dropout: float = 0.0,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, dim)
        self.output_embedding = None if tied_embedding else nn.Embedding(vocab_size, dim)
        if learned_positions:
            self.position_embedding = nn.Parameter(torch.empty(max_seq_len, dim))
        else:
            self.register_buffer("position_embedding", sincos_1d(max_seq_len, dim), persistent=False)
        self.blocks: LayerStack[DecoderBlock] = LayerStack(
            DecoderBlock(dim, num_heads, mlp_dim, dropout, drop_path) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.output_bias = nn.Parameter(torch.zeros(vocab_size)) if output_bias else None
        self.apply(init_weights)
        nn.init.trunc_normal_(self.token_embedding.weight, std=0.02)
        if self.output_embedding is not None:
            nn.init.trunc_normal_(self.output_embedding.weight, std=0.02)
        if learned_positions:
            nn.init.trunc_normal_(self.position_embedding, std=0.02)

    @property
    def max_seq_len(self) -> int:
        """Number of positions, including those of the prompt."""
        return len(self.position_embedding)

    def forward(self, tokens: Tensor, memory: Tensor) -> Tensor:
        """Return causal hidden states (R, T, D) of tokens (R, T) on memory (B, N, D)."""
        return self.norm(self.blocks.run(self._embed(tokens, 0), memory))

    def forward_packed(self, tokens: Tensor, positions: Tensor, layout: Layout, memory: Tensor) -> Tensor:
        """Return hidden states (L, D) of tokens (L,) in sequences end to end, on memory (B, N, D)."""
        # The gradient of `F.embedding` takes a fraction of the time of that of indexing.
        x = self.token_embedding(tokens) + F.embedding(positions, self.position_embedding)
        return self.norm(self.blocks.run(x, memory, layout))

    @property
    def output_weight(self) -> Tensor:
        """Weight (V, D) of the output layer."""
        return (self.output_embedding or self.token_embedding).weight

    def logits(self, hidden: Tensor, ids: slice | None = None) -> Tensor:
        """Map hidden states (..., D) to logits (..., V), or only to those of `ids`."""
        if ids is None:
            return F.linear(hidden, self.output_weight, self.output_bias)
        return F.linear(hidden, self.output_weight[ids], None if self.output_bias is None else self.output_bias[ids])

    def new_cache(self, memory: Tensor, *, rows_per_image: int, num_slots: int) -> KVCache:
        """Create an empty cache for `rows_per_image` sequences on each of B memories (B, N, D)."""
        projected = (block.cross_attention.project_memory(memory) for block in self.blocks)
        return KVCache.allocate(projected, num_rows=len(memory) * rows_per_image, num_slots=num_slots)

    def step(self, tokens: Tensor, cache: KVCache) -> Tensor:
        """Read the next tokens (R, t) of every row. Return the hidden states (R, D) after the last."""
        x = self._embed(tokens, cache.length)
        for block, layer in zip(self.blocks, cache.layers, strict=True):
            x = block.step(x, layer, cache.length)
        cache.length += tokens.shape[1]
        return self.norm(x[:, -1])

    def check_length(self, length: int) -> None:
        """Raise `ValueError` if a sequence of `length` tokens has more than `max_seq_len`."""
        if length > self.max_seq_len:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the decoder's {self.max_seq_len} positions; "
                "raise model.decoder.max_seq_len or ask for fewer tokens"
            )

    def _embed(self, tokens: Tensor, start: int) -> Tensor:
        end = start + tokens.shape[1]
        self.check_length(end)
        return self.token_embedding(tokens) + self.position_embedding[start:end]

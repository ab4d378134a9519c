"""Pre-norm Transformer layers of the encoder and the decoder.

Shapes: B batch, T tokens, D width, H heads.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from pix2seq.model.cpu_attention import attend_on_cpu

Layer = TypeVar("Layer", bound=nn.Module)

NORM_EPS = 1e-6  # the official layer norms


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """(B, T, D) to (B, H, T, D / H)."""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Tensor) -> Tensor:
    """(B, H, T, D / H) to (B, T, D)."""
    return x.transpose(1, 2).flatten(-2)


def attend(q: Tensor, k: Tensor, v: Tensor, *, is_causal: bool = False) -> Tensor:
    """Compute scaled dot-product attention of queries (B, H, T, d) on keys and values (B, H, N, d).

    On the CPU, the backward pass of PyTorch's fused kernel is slower in bf16 than in float32, so bf16 training
    there uses `pix2seq.model.cpu_attention`.
    """
    if q.device.type == "cpu" and q.dtype == torch.bfloat16 and q.requires_grad:
        return cast("Tensor", attend_on_cpu(q, k, v, is_causal))
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


@dataclass(frozen=True)
class Float32Norm:
    """A layer norm in float32 for inference."""

    weight: Tensor
    bias: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.LayerNorm) -> Float32Norm:
        """Return the float32 form of `module`."""
        return cls(module.weight.float(), module.bias.float(), module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class LayerStack(nn.ModuleList, Generic[Layer]):
    """An `nn.ModuleList` of layers of one class, typed as that class."""

    checkpointing = False  # recompute the activations of each layer in the backward pass instead of keeping them

    def __iter__(self) -> Iterator[Layer]:
        return cast("Iterator[Layer]", super().__iter__())

    def run(self, x: Tensor, *args: Any) -> Tensor:
        """Pass x through all layers, each with `args`."""
        for layer in self:
            if self.checkpointing and torch.is_grad_enabled():
                x = cast("Tensor", checkpoint(layer, x, *args, use_reentrant=False))
            else:
                x = layer(x, *args)
        return x


class DropPath(nn.Module):
    """Stochastic depth: drop a residual branch for entire samples (arXiv 1603.09382)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path must lie in [0, 1), got {rate}")
        self.rate = rate

    def forward(self, x: Tensor, sample_index: Tensor | None = None, num_samples: int = 0) -> Tensor:
        """Drop samples of x (B, ...), or of x (L, ...) whose row i belongs to sample `sample_index[i]`."""
        if self.rate == 0 or not self.training:
            return x
        keep = torch.rand(len(x) if sample_index is None else num_samples, device=x.device) >= self.rate
        factor = (keep / (1 - self.rate)).to(x.dtype)
        if sample_index is not None:
            factor = factor.index_select(0, sample_index)
        return x * factor.view(-1, *[1] * (x.ndim - 1))


class SelfAttention(nn.Module):
    """Multi-head self-attention with a joint projection to queries, keys and values."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"width {dim} is not divisible by {num_heads} heads")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Project x (B, T, D) to queries, keys and values, each (B, H, T, D / H)."""
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return split_heads(q, self.num_heads), split_heads(k, self.num_heads), split_heads(v, self.num_heads)

    def forward(self, x: Tensor, *, is_causal: bool = False) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        q, k, v = self.project(x)
        return self.out(merge_heads(attend(q, k, v, is_causal=is_causal)))


class FeedForward(nn.Module):
    """Two linear layers around an exact GELU, with dropout after it."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.expand = nn.Linear(dim, hidden_dim)
        self.dropout = nn.Dropout(dropout)
        self.contract = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        return self.contract(self.dropout(F.gelu(self.expand(x))))


class EncoderBlock(nn.Module):
    """Self-attention and a feed-forward layer, each pre-norm and residual."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, dropout: float, drop_path: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.attention = SelfAttention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = FeedForward(dim, mlp_dim, dropout)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, T, D)."""
        x = x + self.drop_path(self.attention(self.attention_norm(x)))
        return x + self.drop_path(self.mlp(self.mlp_norm(x)))


def init_weights(module: nn.Module) -> None:
    """Initialise weights as Keras does, Glorot-uniform with zero biases. Pass this to `nn.Module.apply`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        if module.bias is not None:
            nn.init.zeros_(module.bias)

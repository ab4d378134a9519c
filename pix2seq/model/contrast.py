"""Embeddings of images and of sentences in one space, in which a sentence lies near the images that it is true of.

An image is pooled from its memory by a learned query, a sentence is the decoder's last state without memory.
References: attention pooling of arXiv 2106.04560, losses and temperature of arXiv 2103.00020.

Shapes: B images, S sentences, N memory tokens, D decoder width, E width of embeddings.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pix2seq.model.decoder import CrossAttention
from pix2seq.model.layers import NORM_EPS, FeedForward, init_weights

START_SCALE = 1 / 0.07  # of similarities in the softmax: the published start and limit
MAX_SCALE = 100.0


class Contrast(nn.Module):
    """Pools memories and projects both kinds of states to unit vectors."""

    def __init__(self, dim: int, num_heads: int, mlp_dim: int, embed_dim: int) -> None:
        super().__init__()
        self.query = nn.Parameter(torch.empty(dim))
        self.attention = CrossAttention(dim, num_heads)
        self.mlp_norm = nn.LayerNorm(dim, eps=NORM_EPS)
        self.mlp = FeedForward(dim, mlp_dim, 0.0)
        self.image = nn.Linear(dim, embed_dim)
        self.sentence = nn.Linear(dim, embed_dim)
        self.log_scale = nn.Parameter(torch.tensor([math.log(START_SCALE)]))  # (1,): FSDP shards no scalars
        self.apply(init_weights)
        nn.init.trunc_normal_(self.query, std=0.02)

    @property
    def scale(self) -> Tensor:
        """What similarities are multiplied by before the softmax, (1,): the inverse of the temperature."""
        return self.log_scale.clamp(max=math.log(MAX_SCALE)).exp()

    def embed_images(self, memory: Tensor) -> Tensor:
        """Memory (B, N, D) to unit vectors (B, E) in float32."""
        query = self.query.expand(len(memory), 1, -1)
        pooled = self.attention(query, *self.attention.project_memory(memory))[:, 0]
        pooled = pooled + self.mlp(self.mlp_norm(pooled))
        return F.normalize(self.image(pooled).float(), dim=-1)

    def embed_states(self, states: Tensor) -> Tensor:
        """Last states (S, D) of sentences to unit vectors (S, E) in float32."""
        return F.normalize(self.sentence(states).float(), dim=-1)

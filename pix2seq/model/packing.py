"""Sequences that lie end to end, and attention over them.

A polygon has ten tokens or two hundred, and an image one object or thirty. Padded to the longest, nine tokens of ten
would be padding. End to end, only attention has to know where a sequence begins. On a GPU in bf16, PyTorch's
`varlen_attn` takes the borders as they are. Elsewhere, sequences of like length are padded together for attention
alone: on the CPU this beat one row per image with a mask.

Shapes: B images, S sequences, L tokens, N memory tokens, H heads, D width, P padded tokens, Q parts that are joined.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pix2seq.model.layers import attend, merge_heads, split_heads

# A group of sequences holds lengths down to this share of its longest, and shorter ones while all of its padding is
# less than so many tokens: with more groups attention starts more often, with fewer it computes more padding.
MIN_LENGTH_SHARE = 0.7
FREE_PADDING = 512


class Layout:
    """Where sequences that lie end to end begin, and which image each reads.

    Built on the host; what a device needs is copied there once, without waiting for it. Where sequences read joined
    memories, an image is one such reading, and the memories (B, N, D) are its parts (Q, N, D).
    """

    def __init__(
        self,
        lengths: Tensor,
        memory_index: Tensor,
        num_images: int,
        device: torch.device,
        *,
        parts: Tensor | None = None,
    ) -> None:
        """`lengths` (S,), `memory_index` (S,), ascending, and `parts` of readings (B, K) lie in host memory.

        `parts` are the memories that each reading joins, in order, -1 after its last.
        """
        self.device = device
        self.parts = None if parts is None else parts.numpy()
        self.lengths = lengths.numpy()
        self.image_lengths = np.bincount(memory_index.numpy(), self.lengths, num_images).astype(np.int64)
        # Of a sequence, and of all of an image; a recorded step serves batches of shorter ones too.
        self.longest, self.longest_image = int(self.lengths.max()), int(self.image_lengths.max())

    @cached_property
    def borders(self) -> Tensor:
        """Where each sequence begins, and the end, (S + 1,) int32."""
        return self._copy(_borders(self.lengths).astype(np.int32))

    @cached_property
    def image_borders(self) -> Tensor:
        """Where the tokens of each image begin, and the end, (B + 1,) int32."""
        return self._copy(_borders(self.image_lengths).astype(np.int32))

    @cached_property
    def image_of_token(self) -> Tensor:
        """The image that each token reads, (L,) int64."""
        return self._copy(np.repeat(np.arange(len(self.image_lengths)), self.image_lengths))

    @cached_property
    def sequence_groups(self) -> Groups:
        """Sequences of like length."""
        return Groups.of(self.lengths, self.device)

    @cached_property
    def image_groups(self) -> Groups:
        """Images with about as many tokens, and as many parts."""
        return Groups.of(self.image_lengths, self.device, kinds=None if self.parts is None else self.num_parts)

    @property
    def num_parts(self) -> NDArray[np.int64]:
        """How many memories each reading joins, (B,)."""
        assert self.parts is not None
        return (self.parts >= 0).sum(axis=1)

    @cached_property
    def joined_parts(self) -> Tensor:
        """The parts of all readings end to end, int64."""
        assert self.parts is not None
        return self._copy(self.parts[self.parts >= 0])

    @cached_property
    def part_borders(self) -> Tensor:
        """Where the parts of each reading begin, and the end, (B + 1,) int32."""
        return self._copy(_borders(self.num_parts).astype(np.int32))

    @cached_property
    def parts_of_groups(self) -> list[Tensor]:
        """Of each of `image_groups`, the parts of its readings end to end, int64."""
        assert self.parts is not None
        return [
            self._copy(some[some >= 0]) for some in (self.parts[runs.cpu().numpy()] for runs in self.image_groups.runs)
        ]

    def self_attention(self, qkv: Tensor, num_heads: int) -> Tensor:
        """Attend causally within each sequence: projected queries, keys and values (L, 3 D) to (L, D)."""
        if _has_varlen(qkv):
            q, k, v = qkv.unflatten(-1, (3, num_heads, -1)).unbind(1)
            longest = self.longest
            return _varlen_attention(q, k, v, self.borders, self.borders, longest, longest, is_causal=True).flatten(1)
        groups = self.sequence_groups
        attended = []
        for part, _, shape in groups.split(groups.pad(qkv)):
            q, k, v = (split_heads(x, num_heads) for x in part.view(*shape, -1).chunk(3, dim=-1))
            attended.append(merge_heads(attend(q, k, v, is_causal=True)).flatten(0, 1))
        return groups.unpad(torch.cat(attended))

    def cross_attention(self, query: Tensor, key_value: Tensor, num_heads: int) -> Tensor:
        """Attend from queries (L, D) to the keys and values (B, N, 2 D) of the image that each token reads: (L, D).

        Where readings join parts, keys and values are those of the parts, (Q, N, 2 D), each projected once.
        """
        if _has_varlen(query):
            key_borders, longest_key = self._key_borders(key_value)
            joined = key_value if self.parts is None else key_value.index_select(0, self.joined_parts)
            k, v = joined.flatten(0, 1).unflatten(-1, (2, num_heads, -1)).unbind(1)
            q = query.unflatten(-1, (num_heads, -1))
            longest = self.longest_image
            return _varlen_attention(q, k, v, self.image_borders, key_borders, longest, longest_key).flatten(1)
        groups = self.image_groups
        memories = groups.runs if self.parts is None else self.parts_of_groups
        attended = []
        for (part, _, shape), read in zip(groups.split(groups.pad(query)), memories, strict=True):
            joined = key_value.index_select(0, read).view(shape[0], -1, key_value.shape[-1])
            k, v = (split_heads(x, num_heads) for x in joined.chunk(2, dim=-1))
            attended.append(merge_heads(attend(split_heads(part.view(*shape, -1), num_heads), k, v)).flatten(0, 1))
        return groups.unpad(torch.cat(attended))

    def _key_borders(self, key_value: Tensor) -> tuple[Tensor, int]:
        """Where the keys of each image begin, and the end, (B + 1,) int32, and the most keys of one."""
        num_memories, num_keys, _ = key_value.shape
        if self.parts is None:
            return _key_borders(num_memories, num_keys, key_value.device), num_keys
        return self.part_borders * num_keys, int(self.num_parts.max()) * num_keys

    def _copy(self, values: NDArray[Any]) -> Tensor:
        tensor = torch.from_numpy(values)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


@dataclass(frozen=True)
class Groups:
    """Runs of tokens, such as sequences, padded with others of like length. Runs without tokens are in no group."""

    runs: list[Tensor]  # of each group, the indices of its runs
    shapes: list[tuple[int, int]]  # of each group, runs and tokens of a run
    slots: Tensor  # (L,) where each token is among the padded ones
    tokens: Tensor  # (P,) which token is in a slot; the first one in slots of padding
    filled: Tensor | None  # (P, 1) bool, false in slots of padding; None if there is none

    @classmethod
    def of(cls, lengths: NDArray[np.int64], device: torch.device, *, kinds: NDArray[np.int64] | None = None) -> Groups:
        """Group runs of these lengths, which lie end to end; a group has runs of one of the `kinds`, if given."""
        kind_of = np.zeros_like(lengths) if kinds is None else kinds
        order = np.lexsort((-lengths, kind_of))
        order = order[lengths[order] > 0]
        members: list[list[int]] = []
        longest = padding = 0  # of the last group
        for run, length in zip(order.tolist(), lengths[order].tolist(), strict=True):
            padding += longest - length
            alike = bool(members) and kind_of[members[-1][0]] == kind_of[run]
            if alike and (length >= MIN_LENGTH_SHARE * longest or padding < FREE_PADDING):
                members[-1].append(run)
            else:
                members.append([run])
                longest, padding = length, 0
        starts = _borders(lengths)
        shapes, sources = [], []
        for some in members:
            longest = int(lengths[some[0]])
            steps = np.arange(longest)
            sources.append(np.where(steps < lengths[some][:, None], starts[some][:, None] + steps, -1).ravel())
            shapes.append((len(some), longest))
        source = np.concatenate(sources)
        slots = np.empty(int(lengths.sum()), np.int64)
        slots[source[source >= 0]] = np.flatnonzero(source >= 0)
        filled = torch.from_numpy(source >= 0)[:, None]
        return cls(
            [torch.tensor(some, device=device) for some in members],
            shapes,
            torch.from_numpy(slots).to(device),
            torch.from_numpy(np.maximum(source, 0)).to(device),
            None if bool(filled.all()) else filled.to(device),
        )

    def pad(self, x: Tensor) -> Tensor:
        """Tokens (L, D) to slots (P, D)."""
        return cast("Tensor", _Pad.apply(x, self.slots, self.tokens, None))

    def unpad(self, x: Tensor) -> Tensor:
        """Slots (P, D) to tokens (L, D)."""
        return cast("Tensor", _Pad.apply(x, self.tokens, self.slots, self.filled))

    def split(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor, tuple[int, int]]]:
        """Yield the slots of each group, (runs * tokens, D), its runs and its shape."""
        sizes = [rows * length for rows, length in self.shapes]
        yield from zip(x.split(sizes), self.runs, self.shapes, strict=True)


class _Pad(torch.autograd.Function):
    """Rows of x by their indices, none of which but padding comes twice: so the gradient needs no sums."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, back: Tensor, indices: Tensor, filled: Tensor | None) -> Tensor:
        ctx.back, ctx.filled = back, filled
        return x.index_select(0, indices)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        grad = grads[0].index_select(0, ctx.back)
        # What padding computes is dropped, so it has no gradient.
        return grad if ctx.filled is None else grad.mul_(ctx.filled), None, None, None


def _borders(lengths: NDArray[np.int64]) -> NDArray[np.int64]:
    return np.append(0, np.cumsum(lengths))


@cache
def _takes_is_causal() -> bool:
    """Whether `varlen_attn` has `is_causal`, as in PyTorch 2.11; later releases say the same by a window."""
    from torch.nn.attention.varlen import varlen_attn

    return "is_causal" in inspect.signature(varlen_attn).parameters


@cache
def _key_borders(num_images: int, num_keys: int, device: torch.device) -> Tensor:
    return torch.arange(0, num_images * num_keys + 1, num_keys, dtype=torch.int32, device=device)


def _has_varlen(x: Tensor) -> bool:
    """Whether `varlen_attn` computes this: flash attention, on CUDA and in half precision."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)


def _varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, q_borders: Tensor, k_borders: Tensor, longest_q: int, longest_k: int, *,
    is_causal: bool = False,
) -> Tensor:  # fmt: skip
    """Attention of queries (L, H, d) on keys and values (M, H, d) between borders."""
    from torch.nn.attention.varlen import varlen_attn

    if not is_causal:
        causal: dict[str, Any] = {}
    elif _takes_is_causal():
        causal = {"is_causal": True}
    else:
        causal = {"window_size": (-1, 0)}
    # cuDNN would build a plan for each new shape, and each batch is one.
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        return cast("Tensor", varlen_attn(q, k, v, q_borders, k_borders, longest_q, longest_k, **causal))

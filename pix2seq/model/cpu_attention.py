"""bf16 attention in training on the CPU.

The gradient of PyTorch's fused kernel does not use the processor's bf16 matrix units, batched products
do. Scores are computed again from what was saved, for a few images at a time, so that no more of them
than a cache holds exist at once. Forward and gradient are one operation each, which torch.compile leaves alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_AT_ONCE = 2**21  # attention scores whose gradient is computed together: 4 MiB in bf16, about a core's cache


@torch.library.custom_op("pix2seq::attend_on_cpu", mutates_args=())
def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    """Attention with the fused kernel, its gradient by matrix products.

    For shapes, see `pix2seq.model.layers.attend`.
    """
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal)


@torch.library.custom_op("pix2seq::attend_on_cpu_backward", mutates_args=())
def _backward(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values."""
    (num_images, num_heads, num_queries, head_dim), num_keys = q.shape, k.shape[-2]
    if is_causal:
        mask = torch.ones(1, 1, num_queries, num_keys, dtype=torch.bool).tril()
    scale = head_dim**-0.5
    # Products of matrices that lie one behind the other; each goes where it is needed next, without a copy.
    queries, keys, values, grad = (x.flatten(0, 1).contiguous() for x in (q * scale, k, v, grad_out))
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (queries, keys, values))
    images_at_once = min(max(SCORES_AT_ONCE // (num_heads * num_queries * num_keys), 1), num_images)
    room = torch.empty(3, images_at_once * num_heads, num_queries, num_keys, dtype=q.dtype)
    for image in range(0, num_images, images_at_once):
        last = min(image + images_at_once, num_images)
        at = slice(image * num_heads, last * num_heads)
        shares, grad_shares, grad_scores = room[:, : (last - image) * num_heads]
        torch.bmm(queries[at], keys[at].mT, out=shares)
        if mask is not None:
            shares.unflatten(0, (-1, num_heads)).masked_fill_(
                ~(mask if len(mask) == 1 else mask[image:last]), -torch.inf
            )
        torch.softmax(shares, -1, out=shares)
        torch.bmm(shares.mT, grad[at], out=grad_v[at])
        torch.bmm(grad[at], values[at].mT, out=grad_shares)
        torch._softmax_backward_data(grad_shares, shares, -1, shares.dtype, grad_input=grad_scores)
        torch.bmm(grad_scores, keys[at], out=grad_q[at])
        torch.bmm(grad_scores.mT, queries[at], out=grad_k[at])
    grad_q.mul_(scale)
    whole = (num_images, num_heads)
    return grad_q.unflatten(0, whole), grad_k.unflatten(0, whole), grad_v.unflatten(0, whole)


@attend_on_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@_backward.register_fake
def _(
    grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return grad_q, grad_k, grad_v


def _keep_for_gradient(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def _gradient(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, *ctx.saved_tensors, ctx.is_causal), None, None


attend_on_cpu.register_autograd(_gradient, setup_context=_keep_for_gradient)

"""bf16 attention for training on the CPU.

Batched matrix products use the processor's bf16 matrix units; the backward pass of PyTorch's fused kernel does not.
The backward pass here recomputes the scores of a few images at a time, so that they fit in the cache. Forward and
backward are one operation each, which torch.compile leaves alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCORES_AT_ONCE = 2**21  # attention scores per batch of the backward pass: 4 MiB in bf16, about a core's cache


@torch.library.custom_op("pix2seq::attend_on_cpu", mutates_args=())
def attend_on_cpu(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    """Compute attention with the fused kernel, and its gradient with matrix products.

    See `pix2seq.model.layers.attend` for shapes.
    """
    return F.scaled_dot_product_attention(q, k, v, is_causal=is_causal)


@torch.library.custom_op("pix2seq::attend_on_cpu_backward", mutates_args=())
def _backward(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of queries, keys and values."""
    (num_images, num_heads, num_queries, head_dim), num_keys = q.shape, k.shape[-2]
    hidden = torch.ones(num_queries, num_keys, dtype=torch.bool).triu(1) if is_causal else None
    scale = head_dim**-0.5
    # Contiguous matrices, and outputs that are written in place, avoid copies.
    queries, keys, values, grad = (x.flatten(0, 1).contiguous() for x in (q * scale, k, v, grad_out))
    grad_q, grad_k, grad_v = (torch.empty_like(x) for x in (queries, keys, values))
    images_at_once = min(max(SCORES_AT_ONCE // (num_heads * num_queries * num_keys), 1), num_images)
    buffers = torch.empty(3, images_at_once * num_heads, num_queries, num_keys, dtype=q.dtype)
    for image in range(0, num_images, images_at_once):
        last = min(image + images_at_once, num_images)
        at = slice(image * num_heads, last * num_heads)
        probs, grad_probs, grad_scores = buffers[:, : (last - image) * num_heads]
        torch.bmm(queries[at], keys[at].mT, out=probs)
        if hidden is not None:
            probs.masked_fill_(hidden, -torch.inf)
        torch.softmax(probs, -1, out=probs)
        torch.bmm(probs.mT, grad[at], out=grad_v[at])
        torch.bmm(grad[at], values[at].mT, out=grad_probs)
        torch._softmax_backward_data(grad_probs, probs, -1, probs.dtype, grad_input=grad_scores)
        torch.bmm(grad_scores, keys[at], out=grad_q[at])
        torch.bmm(grad_scores.mT, queries[at], out=grad_k[at])
    grad_q.mul_(scale)
    shape = (num_images, num_heads)
    return grad_q.unflatten(0, shape), grad_k.unflatten(0, shape), grad_v.unflatten(0, shape)


@attend_on_cpu.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> Tensor:
    return torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)


@_backward.register_fake
def _(grad_out: Tensor, q: Tensor, k: Tensor, v: Tensor, is_causal: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad_q, grad_k, grad_v = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return grad_q, grad_k, grad_v


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.is_causal = inputs
    ctx.save_for_backward(*tensors)


def _autograd(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
    return *_backward(grad_out, *ctx.saved_tensors, ctx.is_causal), None


attend_on_cpu.register_autograd(_autograd, setup_context=_setup_context)

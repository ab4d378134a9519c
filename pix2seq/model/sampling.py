"""From logits to the next id: greedy, temperature, top-k and nucleus. Pure functions.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor


def truncate_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Logits (R, V) with all that sampling must not choose at minus infinity.

    `top_k` > 0 keeps the k largest (and ties). `top_p` < 1 then keeps the largest set whose total
    probability is *at most* `top_p`, and always the largest logit. This is the official rule; the
    usual nucleus (arXiv 1904.09751) keeps the smallest set of *at least* `top_p`, one token more.
    """
    if top_k > 0:
        kth_largest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]
        logits = logits.masked_fill(logits < kth_largest, -torch.inf)
    if top_p < 1.0:
        descending = logits.sort(dim=-1, descending=True).values
        within = descending.softmax(-1).cumsum(-1) <= top_p
        smallest_kept = descending.masked_fill(~within, torch.inf).amin(-1, keepdim=True)
        smallest_kept = torch.minimum(smallest_kept, descending[:, :1])
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    return logits


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose ids (R,) from logits (R, V). `temperature` 0 or `top_k` 1 is greedy, without randomness."""
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    if temperature == 0 or top_k == 1:
        return logits.argmax(-1)
    kept = truncate_logits(logits.float() / temperature, top_k=top_k, top_p=top_p)
    return torch.multinomial(kept.softmax(-1), 1, generator=generator)[:, 0]

"""From logits to the next id: greedy, temperature, top-k and nucleus. Pure functions.

Shapes: R rows, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Logits that are tried before all are sorted: sorting 3000 takes a CPU ten times as long as finding these.
MAX_FEW = 64


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
        descending, sums = _descending(logits, top_p)
        within = sums <= top_p
        smallest_kept = descending.masked_fill(~within, torch.inf).amin(-1, keepdim=True)
        smallest_kept = torch.minimum(smallest_kept, descending[:, :1])
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    return logits


def _descending(logits: Tensor, enough: float) -> tuple[Tensor, Tensor]:
    """Logits (R, k) from the largest on, and the running sum of their probabilities.

    These are all, or as many as it takes in every row for the sum to pass `enough`.
    """
    probs = logits.softmax(-1)
    if logits.device.type == "cpu" and logits.shape[-1] > 2 * MAX_FEW:
        few = logits.topk(MAX_FEW, dim=-1)
        sums = probs.gather(-1, few.indices).cumsum(-1)
        if bool((sums[:, -1] > enough).all()):
            return few.values, sums
    every = logits.sort(dim=-1, descending=True)
    return every.values, probs.gather(-1, every.indices).cumsum(-1)


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    forbidden: Tensor | None = None,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Choose ids (R,) from logits (R, V). `temperature` 0 or `top_k` 1 is greedy, without randomness.

    Where `forbidden` (R, V) is true nothing is chosen, whatever the logits: an id that is NaN or minus
    infinity counts as impossible, and in a row of nothing else all allowed ids are equally likely
    (greedy takes one of them). `noise` (R,), uniform in [0, 1), fixes what each row draws; without it,
    it comes from `generator`.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    greedy = is_greedy(temperature, top_k)
    scaled = logits.float() if greedy or temperature == 1 else logits.float() / temperature
    # Of finite numbers a softmax is never NaN; the lowest float has probability 0 next to any other.
    lowest = torch.finfo(scaled.dtype).min
    scaled = scaled.nan_to_num(nan=lowest, neginf=lowest)
    if forbidden is not None:
        scaled.masked_fill_(forbidden, -torch.inf)
    if greedy:
        return scaled.argmax(-1)
    if noise is None:
        noise = torch.rand(len(logits), generator=generator, device=logits.device)
    return _draw(truncate_logits(scaled, top_k=top_k, top_p=top_p).softmax(-1), noise)


def is_greedy(temperature: float, top_k: int) -> bool:
    """Whether `sample` always takes the largest logit."""
    return temperature == 0 or top_k == 1


def _draw(probs: Tensor, noise: Tensor) -> Tensor:
    """Ids (R,) drawn from probs (R, V): where the running sum passes `noise` (R,) of the total.

    One number a row and step, so that what a row draws can be fixed before it is known which rows are
    in the batch; `torch.multinomial` takes as many as there are ids, and 25 times as long.
    """
    sums = probs.cumsum(-1)
    ids = torch.searchsorted(sums, noise[:, None] * sums[:, -1:], right=True).clamp_(max=probs.shape[-1] - 1)
    # Rounding may end the search behind the last id that is possible.
    possible = probs.gather(-1, ids) > 0
    return torch.where(possible, ids, probs.argmax(-1, keepdim=True))[:, 0]

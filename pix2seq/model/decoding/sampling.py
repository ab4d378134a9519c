"""Sampling the next id from logits: greedy, temperature, top-k and nucleus. Pure functions.

Shapes: R rows, V vocabulary size.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pix2seq.model.decoding.completion import is_greedy

# Largest logits to try before sorting all: on a CPU, sorting 3000 takes ten times as long as finding these.
NUM_CANDIDATES = 64


def truncate_logits(logits: Tensor, *, top_k: int = 0, top_p: float = 1.0) -> Tensor:
    """Set logits (R, V) that sampling must not choose to minus infinity.

    `top_k` > 0 keeps the k largest (and ties). `top_p` < 1 then keeps the largest set with a total probability
    of *at most* `top_p`, and always the largest logit. This is the official rule; the usual nucleus
    (arXiv 1904.09751) keeps the smallest set of *at least* `top_p`, one token more.
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


def _descending(logits: Tensor, min_sum: float) -> tuple[Tensor, Tensor]:
    """Return the largest logits (R, k) in descending order, and the cumulative sum of their probabilities.

    k is V, or fewer if the sum exceeds `min_sum` in every row.
    """
    probs = logits.softmax(-1)
    if logits.device.type == "cpu" and logits.shape[-1] > 2 * NUM_CANDIDATES:
        largest = logits.topk(NUM_CANDIDATES, dim=-1)
        sums = probs.gather(-1, largest.indices).cumsum(-1)
        if bool((sums[:, -1] > min_sum).all()):
            return largest.values, sums
    ordered = logits.sort(dim=-1, descending=True)
    return ordered.values, probs.gather(-1, ordered.indices).cumsum(-1)


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
    """Sample ids (R,) from logits (R, V). `temperature` 0 or `top_k` 1 is greedy, without randomness.

    Ids where `forbidden` (R, V) is true are never chosen, whatever the logits. Logits that are NaN or minus infinity
    have probability 0. If all allowed logits of a row are, all allowed ids are equally likely (greedy takes one of
    them). `noise` (R,), uniform in [0, 1), fixes the result; by default it is drawn from `generator`.
    """
    if temperature < 0:
        raise ValueError(f"temperature must be 0 (greedy) or more, got {temperature}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p}")
    greedy = is_greedy(temperature, top_k)
    scaled = logits.float() if greedy or temperature == 1 else logits.float() / temperature
    # The softmax of finite numbers is never NaN, and the lowest float has probability 0 next to any other.
    lowest = torch.finfo(scaled.dtype).min
    scaled = scaled.nan_to_num(nan=lowest, neginf=lowest)
    if forbidden is not None:
        scaled.masked_fill_(forbidden, -torch.inf)
    if greedy:
        return scaled.argmax(-1)
    if noise is None:
        noise = torch.rand(len(logits), generator=generator, device=logits.device)
    return _draw(truncate_logits(scaled, top_k=top_k, top_p=top_p).softmax(-1), noise)


def _draw(probs: Tensor, noise: Tensor) -> Tensor:
    """Draw ids (R,) from probs (R, V), where the cumulative sum passes `noise` (R,) of the total.

    One number per row and step can be drawn in advance, independent of the other rows in the batch.
    `torch.multinomial` needs a number per id, and takes 25 times as long.
    """
    sums = probs.cumsum(-1)
    ids = torch.searchsorted(sums, noise[:, None] * sums[:, -1:], right=True).clamp_(max=probs.shape[-1] - 1)
    # Rounding can end the search after the last possible id.
    possible = probs.gather(-1, ids) > 0
    return torch.where(possible, ids, probs.argmax(-1, keepdim=True))[:, 0]

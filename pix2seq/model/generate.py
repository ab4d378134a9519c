"""Continue prompts token by token, with cached keys and values.

Shapes: B images, I prompts an image, S samples a prompt, R = B * I * S rows, P prompt tokens,
T' new tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pix2seq.model.decoder import Decoder
from pix2seq.model.grammar import Grammar
from pix2seq.model.sampling import sample


@dataclass(frozen=True)
class Generated:
    """New tokens, without the prompt. After a row's end token everything is padding."""

    tokens: Tensor  # (R, T')
    logprobs: (
        Tensor  # (R, T') of each token under the model itself: no temperature, grammar or truncation; 0 in padding
    )
    best_tokens: Tensor | None  # (R, T') likeliest id inside `score_range`, if one was given
    best_logprobs: Tensor | None  # (R, T') its log-probability


@torch.inference_mode()
def generate(
    decoder: Decoder,
    memory: Tensor,
    prompt: Tensor,
    *,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    grammar: Grammar | None = None,
    num_samples: int = 1,
    score_range: tuple[int, int] | None = None,
    eos_id: int | None = 0,
    pad_id: int = 0,
    generator: torch.Generator | None = None,
) -> Generated:
    """Continue each prompt until `eos_id` or for `max_new_tokens`.

    `memory` is (B, N, D); `prompt` (B, P), or (B, I, P) for I prompts an image. Rows come out in that
    order, the `num_samples` continuations of a prompt side by side. A `grammar` masks the ids that
    would not parse. `score_range` asks, at every step, for the likeliest id in [low, high) and its
    probability: detection scores with it, because the token it samples may be the noise class. With
    `eos_id` None nothing ends a row early.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if prompt.shape[0] != memory.shape[0]:
        raise ValueError(f"{prompt.shape[0]} prompts were given for {memory.shape[0]} images")
    rows = prompt.reshape(-1, prompt.shape[-1]).repeat_interleave(num_samples, dim=0)  # (R, P)
    num_rows, prompt_len = rows.shape
    cache = decoder.new_cache(memory, rows_per_image=num_rows // memory.shape[0], num_slots=prompt_len + max_new_tokens)

    tokens = rows.new_full((num_rows, max_new_tokens), pad_id)
    logprobs = torch.zeros(num_rows, max_new_tokens, device=memory.device)
    best_tokens = torch.full_like(tokens, pad_id) if score_range else None
    best_logprobs = torch.full_like(logprobs, -torch.inf) if score_range else None
    finished = torch.zeros(num_rows, dtype=torch.bool, device=memory.device)

    length = 0
    hidden = decoder.step(rows, cache)
    while True:
        logits = decoder.logits(hidden).float()  # (R, V)
        log_total = logits.logsumexp(-1)  # (R,)
        if score_range and best_tokens is not None and best_logprobs is not None:
            best = logits[:, slice(*score_range)].max(-1)
            best_tokens[:, length] = best.indices + score_range[0]
            best_logprobs[:, length] = (best.values - log_total).masked_fill(finished, -torch.inf)
        choices = logits if grammar is None else grammar.allowed(tokens[:, :length]).mask(logits)
        next_id = sample(choices, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        chosen_logprob = logits.gather(-1, next_id[:, None])[:, 0] - log_total
        tokens[:, length] = next_id.masked_fill(finished, pad_id)
        logprobs[:, length] = chosen_logprob.masked_fill(finished, 0.0)
        if eos_id is not None:
            finished |= next_id == eos_id
        length += 1
        if length == max_new_tokens or (eos_id is not None and bool(finished.all())):
            break
        hidden = decoder.step(tokens[:, length - 1 : length], cache)

    return Generated(
        tokens[:, :length],
        logprobs[:, :length],
        None if best_tokens is None else best_tokens[:, :length],
        None if best_logprobs is None else best_logprobs[:, :length],
    )

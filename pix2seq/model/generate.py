"""Continue prompts token by token, with cached keys and values.

Shapes: B images, I prompts an image, S samples a prompt, R = B * I * S rows, P prompt tokens,
T' new tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pix2seq.model.decoder import Decoder
from pix2seq.model.grammar import Allowed, Grammar
from pix2seq.model.kv_cache import KVCache
from pix2seq.model.sampling import is_greedy, sample

# Rows leave once they are this share of those there: moving the cache costs about as much as a step.
MAX_SHARE_LEFT = 0.75
# Vocabulary ids times width of an output layer that is worth the 30 microseconds to find which part is needed.
MIN_PARTIAL_OUTPUT = 2**20


@dataclass(frozen=True)
class Generated:
    """New tokens, without the prompt. After a row's end token everything is padding."""

    tokens: Tensor  # (R, T')
    # (R, T') of each token under the model itself: no temperature, grammar or truncation; 0 in padding, and
    # everywhere if they were not asked for; minus infinity where the model's logits are no numbers
    logprobs: Tensor
    best_tokens: Tensor | None  # (R, T') likeliest id inside `score_range`, if one was given
    best_logprobs: Tensor | None  # (R, T') its log-probability; minus infinity in steps that were not asked for
    truncated: Tensor  # (R,) bool: cut by length, or ended because nothing else fitted; never with `eos_id` None


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
    score_steps: tuple[int, int] = (1, 0),
    with_logprobs: bool = True,
    score_without: int | None = None,
    eos_id: int | None = 0,
    pad_id: int = 0,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    compact: bool = True,
) -> Generated:
    """Continue each prompt until `eos_id` or for `max_new_tokens`.

    `memory` is (B, N, D); `prompt` (B, P), or (B, I, P) for I prompts an image. Rows come out in that
    order, the `num_samples` continuations of a prompt side by side. A `grammar` masks the ids that
    would not parse, also where the logits are NaN or infinite. With `eos_id` None nothing ends a row
    early.

    `score_range` asks for the likeliest id in [low, high) and its probability: detection scores with
    it, because the token it samples may be the noise class. `score_steps` (period, phase) asks for it
    only at steps t with t % period == phase. Without `with_logprobs`, and at steps without a score,
    no softmax over the whole vocabulary is taken, and of a large output layer only the part that the
    grammar allows is computed.

    Log-probabilities are of all ids but `score_without`, where one is given: as if the model could not say it.

    Rows draw from numbers that are fixed at the start, R rows of T', from `generator`; given one
    generator for each image, what an image's rows draw does not depend on the images beside it.
    Finished rows leave the batch; `compact` False keeps them to the end.
    """
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if prompt.shape[0] != memory.shape[0]:
        raise ValueError(f"{prompt.shape[0]} prompts were given for {memory.shape[0]} images")
    prompts = prompt.reshape(-1, prompt.shape[-1]).repeat_interleave(num_samples, dim=0)  # (R, P)
    num_rows, prompt_len = prompts.shape
    num_images, device = memory.shape[0], memory.device
    cache = decoder.new_cache(memory, rows_per_image=num_rows // num_images, num_slots=prompt_len + max_new_tokens)
    real = cache if isinstance(cache, KVCache) else None  # a decoder without one can neither drop rows nor ids

    shape = (num_rows, max_new_tokens)
    rows = {
        "index": torch.arange(num_rows, device=device),
        "tokens": prompts.new_full(shape, pad_id),
        "logprobs": torch.zeros(shape, device=device),
        "finished": torch.zeros(num_rows, dtype=torch.bool, device=device),
        "truncated": torch.zeros(num_rows, dtype=torch.bool, device=device),
    }
    if score_range:
        rows["best_tokens"] = torch.full_like(rows["tokens"], pad_id)
        rows["best_logprobs"] = torch.full(shape, -torch.inf, device=device)
    if not is_greedy(temperature, top_k):
        rows["noise"] = _uniform(shape, num_images, generator, device)
    results = rows  # all rows; `rows` becomes a copy of those that are left once some have gone

    length = 0
    hidden = decoder.step(prompts, cache)
    while True:
        tokens, finished = rows["tokens"], rows["finished"]
        allowed = None if grammar is None else grammar.allowed(tokens[:, :length])
        scored = score_range is not None and length % score_steps[0] == score_steps[1]
        if real is None:
            first, logits = 0, decoder.logits(hidden)
        elif with_logprobs or scored or allowed is None or not _is_worth_part(decoder):
            first, logits = 0, decoder.logits(hidden, cache=real)
        else:
            first, past = allowed.span()
            logits = decoder.logits(hidden, cache=real, ids=slice(first, past))
        logits = logits.float()  # (R, V), or (R, past - first)
        next_id = first + sample(
            logits,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            forbidden=None if allowed is None else _forbidden(allowed, first, logits),
            noise=rows["noise"][:, length] if "noise" in rows else None,
        )
        if with_logprobs or scored:
            counted = logits
            if score_without is not None:
                counted = logits.index_fill(-1, torch.tensor([score_without], device=device), -torch.inf)
            log_total = counted.logsumexp(-1)  # (R,)
        if with_logprobs:
            chosen = logits.gather(-1, next_id[:, None])[:, 0]
            rows["logprobs"][:, length] = _log(chosen, log_total).masked_fill_(finished, 0.0)
        if scored and score_range:
            best = logits[:, slice(*score_range)].max(-1)
            rows["best_tokens"][:, length] = (best.indices + score_range[0]).masked_fill_(finished, pad_id)
            rows["best_logprobs"][:, length] = _log(best.values, log_total).masked_fill_(finished, -torch.inf)
        tokens[:, length] = next_id.masked_fill_(finished, pad_id)
        length += 1
        if eos_id is not None:
            ending = (next_id == eos_id) & ~finished
            if bool(ending.any()):
                if allowed is not None:
                    rows["truncated"] |= ending & allowed.only(eos_id)
                finished |= ending
                if bool(finished.all()):
                    break
                if compact and real is not None and length < max_new_tokens:
                    rows = _drop_finished(rows, results, real)
        if length == max_new_tokens:
            if eos_id is not None:
                rows["truncated"] |= ~rows["finished"]
            break
        hidden = decoder.step(rows["tokens"][:, length - 1 : length], cache)

    _write_back(rows, results)
    return Generated(
        results["tokens"][:, :length],
        results["logprobs"][:, :length],
        results["best_tokens"][:, :length] if score_range else None,
        results["best_logprobs"][:, :length] if score_range else None,
        results["truncated"],
    )


def _uniform(
    shape: tuple[int, int],
    num_images: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """Numbers (R, T') in [0, 1), row by row."""
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=where).to(device)
    if len(generator) != num_images:
        raise ValueError(f"{len(generator)} generators were given for {num_images} images")
    per_image = (shape[0] // num_images, shape[1])
    return torch.cat([torch.rand(per_image, generator=each, device=each.device).to(device) for each in generator])


def _log(logits: Tensor, log_total: Tensor) -> Tensor:
    """Log-probabilities; minus infinity where they are not defined."""
    return (logits - log_total).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


def _is_worth_part(decoder: Decoder) -> bool:
    """Whether finding out which ids are needed takes less time than computing them all."""
    return decoder.output_weight.device.type == "cpu" and decoder.output_weight.numel() >= MIN_PARTIAL_OUTPUT


def _forbidden(allowed: Allowed, first: int, logits: Tensor) -> Tensor:
    """What may not come next, as a mask of logits (R, v) that begin at id `first`."""
    return allowed.forbids(torch.arange(first, first + logits.shape[-1], device=logits.device))


def _drop_finished(rows: dict[str, Tensor], results: dict[str, Tensor], cache: KVCache) -> dict[str, Tensor]:
    """Rows without most that are finished, and the cache likewise.

    Every image that is left keeps as many rows as the one with the most unfinished ones, so that its
    rows can go on sharing its memory; some finished rows may stay to fill up.
    """
    num_images = cache.layers[0].memory_keys.shape[0]
    finished = rows["finished"].view(num_images, -1)
    unfinished = (~finished).sum(1)
    per_image = int(unfinished.max())
    images = unfinished.nonzero()[:, 0]
    if len(images) * per_image > MAX_SHARE_LEFT * finished.numel():
        return rows
    places = finished[images].byte().argsort(dim=1, stable=True)[:, :per_image].sort(dim=1).values
    keep = (images[:, None] * finished.shape[1] + places).flatten()
    _write_back(rows, results)
    cache.keep(images, keep)
    return {name: values[keep] for name, values in rows.items()}


def _write_back(rows: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """Put what is known of `rows` into the `results` of all."""
    if rows is results:
        return
    for name, values in rows.items():
        results[name][rows["index"]] = values

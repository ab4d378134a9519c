"""Continue prompts token by token with NumPy, by the rules of `pix2seq.model.decoding`.

Shapes: B memories, I rows that read the same memory, R = B * I rows still in the batch, P prompt tokens, T new tokens,
V vocabulary size.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from pix2seq.model.decoding.completion import Completion, GenerationConfig, is_greedy
from pix2seq.runtime.graphs import Cache, Floats, Graphs
from pix2seq.vocab import PAD

MAX_SHARE_LEFT = 0.75  # finished rows leave when at most this share would remain: moving the cache takes time too
LOWEST = float(np.finfo(np.float32).min)


def generate(
    graphs: Graphs, memory: Floats, prompts: NDArray[np.int64], config: GenerationConfig, noise: Floats | None
) -> Completion:
    """Continue prompts (B, I, P) on memory (B, N, D). The result has all B * I rows.

    `noise` (B * I, T), uniform in [0, 1), fixes what is drawn; greedy sampling needs none.
    """
    num_rows, num_columns = prompts.shape[0] * prompts.shape[1], config.max_new_tokens
    tokens = np.full((num_rows, num_columns), PAD, np.int64)
    logprobs = np.zeros((num_rows, num_columns), np.float32)
    best_tokens = tokens.copy()
    best_logprobs = np.full((num_rows, num_columns), -np.inf, np.float32)
    finished, truncated = np.zeros((2, num_rows), np.bool_)
    rows = np.arange(num_rows).reshape(prompts.shape[:2])  # of the batch, by memory

    logits, cache = graphs.prefill(prompts, memory)
    for step in range(num_columns):
        at = rows.ravel()
        allowed = None if config.grammar is None else config.grammar.allowed(tokens[at, :step])  # type: ignore[arg-type]
        forbidden = None if allowed is None else allowed.forbids(np.arange(logits.shape[1]))  # type: ignore[arg-type]
        next_id = sample(logits, config, forbidden, None if noise is None else noise[at, step])  # type: ignore[arg-type]
        running = ~finished[at]
        scored = config.is_scored(step)
        if config.with_logprobs or scored:
            counted = np.where(forbidden, -np.inf, logits) if config.score_allowed and forbidden is not None else logits
            log_total = _log_total(counted, without=config.score_without)
        if config.with_logprobs:
            chosen = np.take_along_axis(logits, next_id[:, None], 1)[:, 0]
            logprobs[at, step] = np.where(running, _log(chosen, log_total), 0)
        if scored and config.score_range is not None:
            low, high = config.score_range
            # NaN counts as the largest, as it does in PyTorch.
            best = low + logits[:, low:high].argmax(1)
            best_tokens[at, step] = np.where(running, best, PAD)
            likelihood = _log(np.take_along_axis(logits, best[:, None], 1)[:, 0], log_total)
            best_logprobs[at, step] = np.where(running, likelihood, -np.inf)
        tokens[at, step] = np.where(running, next_id, PAD)

        if config.eos_id is not None:
            ending = running & (next_id == config.eos_id)
            cut = ending & (False if allowed is None else allowed.only(config.eos_id))
            truncated[at] |= cut
            finished[at] |= ending
        if step + 1 == num_columns:
            truncated[at] |= ~finished[at] & (config.eos_id is not None)
        if step + 1 == num_columns or finished.all():
            break
        rows = _drop_finished(rows, finished, cache)
        logits = graphs.step(tokens[rows, step], cache)
    width = step + 1
    has_best = config.score_range is not None
    return Completion(
        tokens[:, :width],
        logprobs[:, :width],
        best_tokens[:, :width] if has_best else None,
        best_logprobs[:, :width] if has_best else None,
        truncated,
    )


def sample(
    logits: Floats, config: GenerationConfig, forbidden: NDArray[np.bool_] | None, noise: Floats | None
) -> NDArray[np.int64]:
    """Sample ids (R,) from logits (R, V), none that is `forbidden` (R, V): see `pix2seq.model.decoding.sampling`.

    With temperature 0, with `top_k` 1 or without `noise` (R,), each id is the likeliest.
    """
    greedy = is_greedy(config.temperature, config.top_k)
    scaled = logits if greedy or config.temperature == 1 else logits / np.float32(config.temperature)
    scaled = np.nan_to_num(scaled, nan=LOWEST, neginf=LOWEST)
    if forbidden is not None:
        scaled[forbidden] = -np.inf
    if greedy or noise is None:
        return scaled.argmax(1)
    probs = _softmax(_truncate(scaled, config.top_k, config.top_p))
    sums = _running_sum(probs)
    ids = (sums <= noise[:, None] * sums[:, -1:]).sum(1).clip(max=probs.shape[1] - 1)
    # Rounding can end the search after the last possible id.
    possible = np.take_along_axis(probs, ids[:, None], 1)[:, 0] > 0
    return np.where(possible, ids, probs.argmax(1))


def uniform(seed: int, shape: tuple[int, int]) -> Floats:
    """Return numbers in [0, 1), the same as `torch.rand(shape, generator=torch.Generator().manual_seed(seed))`.

    Both are the Mersenne Twister, of which PyTorch takes 24 bits for a number, and seeds with the low 32.
    """
    drawn = np.random.RandomState(seed % 2**32).randint(0, 2**32, shape, dtype=np.uint32)
    return (drawn % 2**24).astype(np.float32) / np.float32(2**24)


def _truncate(logits: Floats, top_k: int, top_p: float) -> Floats:
    """Set logits to minus infinity beyond the `top_k` largest, then beyond a total probability of at most `top_p`."""
    if top_k > 0:
        kth_largest = np.sort(logits, axis=1)[:, -min(top_k, logits.shape[1])]
        logits = np.where(logits < kth_largest[:, None], -np.inf, logits)
    if top_p < 1:
        order = np.argsort(-logits, axis=1, kind="stable")
        descending = np.take_along_axis(logits, order, 1)
        within = _running_sum(np.take_along_axis(_softmax(logits), order, 1)) <= np.float32(top_p)
        within[:, 0] = True
        smallest_kept = np.where(within, descending, np.inf).min(axis=1)
        logits = np.where(logits < smallest_kept[:, None], -np.inf, logits)
    return logits


def _softmax(logits: Floats) -> Floats:
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


def _running_sum(probs: Floats) -> Floats:
    return probs.cumsum(axis=1, dtype=np.float64).astype(np.float32)


def _log_total(logits: Floats, *, without: int | None) -> Floats:
    """Return the logarithm of the sum of exponentials (R,), as if the id `without` were impossible."""
    if without is not None:
        logits = logits.copy()
        logits[:, without] = -np.inf
    largest = logits.max(axis=1, keepdims=True)
    return np.log(np.exp(logits - largest).sum(axis=1)) + largest[:, 0]


def _log(logits: Floats, log_total: Floats) -> Floats:
    """Return log-probabilities; minus infinity where they are not defined."""
    return np.nan_to_num(logits - log_total, nan=-np.inf, neginf=-np.inf)


def _drop_finished(rows: NDArray[np.int64], finished: NDArray[np.bool_], cache: Cache) -> NDArray[np.int64]:
    """Drop finished rows from `rows` (B, I) and from the cache if enough are finished. Return the remaining ones.

    All memories keep as many rows as the one with the most unfinished rows; finished rows may stay to fill up.
    """
    done = finished[rows]
    unfinished = (~done).sum(axis=1)
    per_memory = unfinished.max()
    memories = np.flatnonzero(unfinished)
    if len(memories) * per_memory > MAX_SHARE_LEFT * rows.size:
        return rows
    first = np.sort(np.argsort(done[memories], axis=1, kind="stable")[:, :per_memory], axis=1)
    cache.keep(memories, first)
    return rows[memories[:, None], first]

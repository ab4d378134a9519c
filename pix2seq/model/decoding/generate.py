"""Continue prompts token by token, with cached keys and values.

Shapes: B images, I prompts per image, S samples per prompt, R = B * I * S rows, P prompt tokens,
T' new tokens, C columns, V vocabulary size.

All rows are at the same position at every step, so they share a cache without a mask. The first step reads as many
tokens of every prompt as the shortest has. Rows with longer prompts then read one token per step, while others
already generate. Column c of a row is the c-th token after the first step.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pix2seq.model.decoder import Decoder
from pix2seq.model.decoding.completion import Completion, GenerationConfig, is_greedy
from pix2seq.model.decoding.grammar import Allowed
from pix2seq.model.decoding.rows import arrange_rows, drop_finished, new_rows, shift, uniform, write_back
from pix2seq.model.decoding.sampling import sample
from pix2seq.model.decoding.step import DecoderStep
from pix2seq.vocab import PAD

# Size (ids times width) of the output layer from which computing only the allowed part pays; finding it takes 30 us.
MIN_PARTIAL_OUTPUT = 2**20


@dataclass(frozen=True)
class Generated:
    """New tokens, without the prompt. A row is padding after its end token or last token."""

    tokens: Tensor  # (R, T') int64
    # (R, T') of each token under the model itself, without temperature, grammar or truncation. 0 in padding and
    # if not asked for; minus infinity if the logit is not a number
    logprobs: Tensor
    best_tokens: Tensor | None  # (R, T') likeliest id in `score_range`, if given
    best_logprobs: Tensor | None  # (R, T') its log-probability; minus infinity at steps that are not scored
    truncated: Tensor  # (R,) bool: cut by length, or ended because nothing else fitted; false if `eos_id` is None

    def completions(self, num_samples: int) -> list[Completion]:
        """Return the results of each prompt as NumPy arrays, with one transfer per tensor for all prompts."""

        def copied(x: Tensor | None) -> Any:
            return None if x is None else x.cpu().numpy()

        fields = map(copied, (self.tokens, self.logprobs, self.best_tokens, self.best_logprobs, self.truncated))
        return Completion(*fields).split(len(self.tokens) // num_samples)


def generate(
    decoder: Decoder,
    memory: Tensor,
    prompt: Tensor,
    *,
    num_samples: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    compact: bool = True,
    **settings: Any,
) -> Generated:
    """Continue prompts (B, P), or (B, I, P) for I prompts per image, all with the `settings` of one `GenerationConfig`.

    See `generate_mixed` for the other arguments.
    """
    if prompt.shape[0] != memory.shape[0]:
        raise ValueError(f"{prompt.shape[0]} prompts were given for {memory.shape[0]} images")
    prompts = prompt.reshape(-1, prompt.shape[-1]).unbind()
    configs = [GenerationConfig(**settings)] * len(prompts)
    return generate_mixed(
        decoder, memory, prompts, configs, num_samples=num_samples, generator=generator, compact=compact
    )


@torch.inference_mode()
def generate_mixed(
    decoder: Decoder,
    memory: Tensor,
    prompts: Sequence[Tensor],
    configs: Sequence[GenerationConfig],
    *,
    memory_index: Sequence[int] | None = None,
    num_samples: int = 1,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    compact: bool = True,
) -> Generated:
    """Continue prompts (P,) of any lengths, each by its own config. Each gets the result it would get alone.

    `memory` is (B, N, D), and prompt i reads `memory[memory_index[i]]`. Without `memory_index` there are
    B * I prompts in the order of images, I for each. Results are in the order of the prompts, with the
    `num_samples` continuations of a prompt side by side. Each row starts with its first new token.

    `generator` fixes the random numbers of all rows, (R, T'), at the start. With one generator per image,
    the numbers of an image do not depend on other images; with one per prompt, not on other prompts.
    Finished rows leave the batch unless `compact` is False.
    """
    num_images, device = len(memory), memory.device
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if memory_index is None:
        if not prompts or len(prompts) % num_images:
            raise ValueError(f"{len(prompts)} prompts were given for {num_images} images; give as many for each")
        memory_index = [i * num_images // len(prompts) for i in range(len(prompts))]
    if len(configs) != len(prompts):
        raise ValueError(f"{len(configs)} configs were given for {len(prompts)} prompts")
    if not prompts or len(memory_index) != len(prompts) or not set(memory_index) <= set(range(num_images)):
        raise ValueError(
            f"memory_index needs one of 0 to {num_images - 1} for each of {len(prompts)} prompts, got "
            f"{len(memory_index)} values: {sorted(set(memory_index))}"
        )
    images, order = arrange_rows(memory_index, num_samples)
    order = order.to(device)
    shortest = min(len(prompt) for prompt in prompts)
    kinds = [(config, len(prompt) - shortest) for config, prompt in zip(configs, prompts, strict=True)]
    group_of = {kind: index for index, kind in enumerate(dict.fromkeys(kinds))}
    groups = [Group(config, start, index, slice(None)) for (config, start), index in group_of.items()]
    cache = decoder.new_cache(
        memory if images == list(range(num_images)) else memory[images],
        rows_per_image=len(order) // len(images),
        num_slots=shortest + max(group.end for group in groups),
    )
    step = DecoderStep(decoder, cache)

    # Wide enough for the longest continuation at the latest start.
    num_columns = max(group.start for group in groups) + max(config.max_new_tokens for config in configs)
    first_tokens, rows = new_rows(
        [prompt.to(device) for prompt in prompts],
        [group_of[kind] for kind in kinds],
        order,
        num_samples=num_samples,
        num_columns=num_columns,
        with_scores=any(config.score_range for config in configs),
    )
    starts = torch.tensor([group.start for group in groups], device=device)[rows["group"]]
    if not all(group.is_greedy for group in groups):
        lengths = [config.max_new_tokens for config in configs]
        numbers = uniform(lengths, memory_index, num_images, num_samples, generator, device)
        rows["noise"] = shift(numbers[order], -starts, num_columns)
    results = rows  # of all rows; `rows` becomes a copy of the remaining ones when some leave

    remaining = _locate(groups, rows)
    column = 0
    hidden = step.read(first_tokens)
    while True:
        active = [group for group in remaining if group.start <= column < group.end]
        allowed = [group.allowed(rows, column) for group in active]
        any_ended = False
        if active:
            first_id, logits = _logits(step, hidden, active, allowed, column)
            for group, allowed_ids in zip(active, allowed, strict=True):
                any_ended |= _append_tokens(group, rows, column, logits, first_id, allowed_ids)
        column += 1
        if any_ended:
            if bool(rows["finished"].all()):
                break
            if compact and step.has_kv_cache:
                rows = drop_finished(rows, results, step)
                remaining = _locate(groups, rows)
        hidden = step.read(rows["tokens"][:, column - 1 : column])

    write_back(rows, results)
    width = max(min(column, group.end) - group.start for group in groups)
    in_order = order.argsort()[-len(prompts) * num_samples :]  # without fillers
    found = {name: shift(values, starts, width)[in_order] for name, values in results.items() if values.ndim == 2}
    return Generated(
        found["tokens"],
        found["logprobs"],
        found.get("best_tokens"),
        found.get("best_logprobs"),
        results["truncated"][in_order],
    )


@dataclass(frozen=True)
class Group:
    """Rows with the same config and prompt length."""

    config: GenerationConfig
    start: int  # column of the first new token
    index: int
    rows: Tensor | slice  # indices among the remaining rows

    @property
    def end(self) -> int:
        """Column after the last new token."""
        return self.start + self.config.max_new_tokens

    @property
    def is_greedy(self) -> bool:
        """Whether its tokens need no random numbers."""
        return is_greedy(self.config.temperature, self.config.top_k)

    def allowed(self, rows: dict[str, Tensor], column: int) -> Allowed | None:
        """Return the ids that its grammar allows in `column`, or None without a grammar."""
        if self.config.grammar is None:
            return None
        return self.config.grammar.allowed(rows["tokens"][self.rows, self.start : column])

    def needs_all_logits(self, column: int) -> bool:
        """Return whether `column` needs the logits of ids that are not allowed next."""
        return self.config.grammar is None or self.config.with_logprobs or self.config.is_scored(column - self.start)


def _locate(groups: Sequence[Group], rows: dict[str, Tensor]) -> list[Group]:
    """Return the groups with remaining rows, and the indices of those."""
    if len(groups) == 1:
        return list(groups)
    found = [replace(group, rows=(rows["group"] == group.index).nonzero()[:, 0]) for group in groups]
    return [group for group in found if isinstance(group.rows, Tensor) and len(group.rows)]


def _logits(
    step: DecoderStep,
    hidden: Tensor,
    groups: Sequence[Group],
    allowed: Sequence[Allowed | None],
    column: int,
) -> tuple[int, Tensor]:
    """Return the logits (R, v) of the range of ids that the groups need, and the first id of it."""
    if not _has_large_output(step) or any(group.needs_all_logits(column) for group in groups):
        return 0, step.logits(hidden).float()
    spans = [each.span() for each in allowed if each is not None]
    first_id, end = min(span[0] for span in spans), max(span[1] for span in spans)
    return first_id, step.logits(hidden, slice(first_id, end)).float()


def _append_tokens(
    group: Group, rows: dict[str, Tensor], column: int, logits: Tensor, first_id: int, allowed: Allowed | None
) -> bool:
    """Sample the next tokens of a group's rows into `column`. Return whether rows may have ended.

    `logits` (R, v) start at id `first_id`.
    """
    config, at = group.config, group.rows
    logits, finished = logits[at], rows["finished"][at]
    forbidden = None if allowed is None else _forbidden(allowed, first_id, logits)
    next_id = first_id + sample(
        logits,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        forbidden=forbidden,
        noise=None if group.is_greedy else rows["noise"][at, column],
    )
    scored = config.is_scored(column - group.start)
    if config.with_logprobs or scored:
        counted = logits
        if config.score_without is not None:
            counted = logits.index_fill(-1, torch.tensor([config.score_without], device=logits.device), -torch.inf)
        if config.score_allowed and forbidden is not None:
            counted = counted.masked_fill(forbidden, -torch.inf)
        log_total = counted.logsumexp(-1)  # (R,)
    if config.with_logprobs:
        chosen = logits.gather(-1, next_id[:, None])[:, 0]
        rows["logprobs"][at, column] = _log(chosen, log_total).masked_fill_(finished, 0.0)
    if scored and config.score_range:
        best = logits[:, slice(*config.score_range)].max(-1)
        rows["best_tokens"][at, column] = (best.indices + config.score_range[0]).masked_fill_(finished, PAD)
        rows["best_logprobs"][at, column] = _log(best.values, log_total).masked_fill_(finished, -torch.inf)
    rows["tokens"][at, column] = next_id.masked_fill_(finished, PAD)

    is_last = column + 1 == group.end
    if config.eos_id is not None:
        ending = (next_id == config.eos_id) & ~finished
        if not is_last and not bool(ending.any()):
            return False
        cut = ending & allowed.only(config.eos_id) if allowed is not None else torch.zeros_like(ending)
        if is_last:
            cut |= ~(ending | finished)
        rows["truncated"][at] |= cut
        rows["finished"][at] |= ending
    if is_last:
        rows["finished"][at] = True
    return is_last or config.eos_id is not None


def _log(logits: Tensor, log_total: Tensor) -> Tensor:
    """Return log-probabilities; minus infinity where they are not defined."""
    return (logits - log_total).nan_to_num_(nan=-torch.inf, neginf=-torch.inf)


def _has_large_output(step: DecoderStep) -> bool:
    """Return whether finding the allowed part of the output layer takes less time than computing all of it."""
    if not step.has_kv_cache or step.cache.device.type != "cpu":
        return False
    return step.decoder.output_weight.numel() >= MIN_PARTIAL_OUTPUT


def _forbidden(allowed: Allowed, first_id: int, logits: Tensor) -> Tensor:
    """Return a mask of the logits (R, v) that are not allowed next; they start at id `first_id`."""
    return allowed.forbids(torch.arange(first_id, first_id + logits.shape[-1], device=logits.device))

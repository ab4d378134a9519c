"""State of the rows during generation: a dictionary of tensors with rows in the first dimension.

Shapes: B images, I prompts per image, S samples per prompt, R = B * I * S rows, C columns, T' new tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pix2seq.model.decoding.step import DecoderStep
from pix2seq.vocab import PAD

MAX_FILLERS = 0.25  # share of all rows
# Finished rows leave when at most this share of rows would remain: moving the cache costs about as much as a step.
MAX_SHARE_LEFT = 0.75
MAX_SHARE_LEFT_ON_GPU = 0.5  # a GPU also has to record the step again


def arrange_rows(memory_index: Sequence[int], num_samples: int) -> tuple[list[int], Tensor]:
    """Arrange rows in slots of equal size, each for prompts of one image.

    Return the image of each slot, and the index of each row (R,) among the samples of all prompts in their order.
    Slots are filled up with copies of the last prompt's rows, which have negative indices. If these fillers were
    more than `MAX_FILLERS` of all rows, images with many prompts take several smaller slots.
    """
    prompts_of: dict[int, list[int]] = {image: [] for image in sorted(set(memory_index))}
    for prompt, image in enumerate(memory_index):
        prompts_of[image].append(prompt)

    def share_of_prompts(size: int) -> float:
        return len(memory_index) / sum(size * math.ceil(len(some) / size) for some in prompts_of.values())

    largest = max(map(len, prompts_of.values()))
    size = next(size for size in range(largest, 0, -1) if share_of_prompts(size) >= 1 - MAX_FILLERS)
    slots = [(image, some[at : at + size]) for image, some in prompts_of.items() for at in range(0, len(some), size)]
    order = torch.tensor([some + [-1] * (size - len(some)) for _, some in slots], device="cpu").view(-1, 1)
    return [image for image, _ in slots], (order * num_samples + torch.arange(num_samples, device="cpu")).flatten()


def new_rows(
    prompts: Sequence[Tensor],
    groups: Sequence[int],
    order: Tensor,
    *,
    num_samples: int,
    num_columns: int,
    with_scores: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the tokens (R, shortest P) of the first step, and the state of rows with `num_columns` after them.

    Column 0 is the first token after those, so longer prompts continue in `tokens`. `groups` holds the group of each
    prompt. `order` comes from `arrange_rows`; fillers are finished from the start.
    """
    shortest = min(len(prompt) for prompt in prompts)
    read = pad_sequence(list(prompts), batch_first=True, padding_value=PAD)
    read = F.pad(read, (0, shortest + num_columns - read.shape[1]), value=PAD).repeat_interleave(num_samples, dim=0)[
        order
    ]
    device, shape = read.device, (len(read), num_columns)
    rows = {
        "index": torch.arange(len(read), device=device),
        "group": torch.tensor(groups, device=device).repeat_interleave(num_samples)[order],
        "tokens": read[:, shortest:].contiguous(),
        "logprobs": torch.zeros(shape, device=device),
        "finished": order < 0,
        "truncated": torch.zeros(len(read), dtype=torch.bool, device=device),
    }
    if with_scores:
        rows["best_tokens"] = torch.full_like(rows["tokens"], PAD)
        rows["best_logprobs"] = torch.full(shape, -torch.inf, device=device)
    return read[:, :shortest], rows


def uniform(
    lengths: Sequence[int],
    memory_index: Sequence[int],
    num_images: int,
    num_samples: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """Return uniform numbers in [0, 1) for the samples of each prompt, (len(lengths) * num_samples, max(lengths)).

    `lengths` holds the largest number of new tokens of each prompt. All numbers move to `device` in one transfer.
    """
    longest = max(lengths)
    if generator is None or isinstance(generator, torch.Generator):
        shape, where = (len(lengths) * num_samples, longest), device if generator is None else generator.device
        return torch.rand(shape, generator=generator, device=where).to(device)
    if len(generator) == len(lengths):
        drawn = [
            F.pad(torch.rand((num_samples, length), generator=each, device=each.device), (0, longest - length))
            for length, each in zip(lengths, generator, strict=True)
        ]
    elif len(generator) == num_images:
        of_image = [
            iter(torch.rand((memory_index.count(i), num_samples, longest), generator=each, device=each.device))
            for i, each in enumerate(generator)
        ]
        drawn = [next(of_image[i]) for i in memory_index]
    else:
        raise ValueError(
            f"{len(generator)} generators were given for {num_images} images and {len(lengths)} prompts; "
            "give one, one per image or one per prompt"
        )
    return torch.cat(drawn).to(device)


def shift(values: Tensor, by: Tensor, width: int) -> Tensor:
    """Return `width` columns of values (R, C) from column `by` (R,) on. Columns outside repeat the outermost."""
    columns = torch.arange(width, device=values.device) + by[:, None]
    return values.gather(1, columns.clamp_(0, values.shape[1] - 1))


def drop_finished(rows: dict[str, Tensor], results: dict[str, Tensor], step: DecoderStep) -> dict[str, Tensor]:
    """Drop finished rows from `rows` and from the cache of `step` if enough are finished. Return the remaining ones.

    All images keep as many rows as the one with the most unfinished rows, so that rows can still share the memory
    of their image. Finished rows may stay as fillers.
    """
    num_images = step.cache.layers[0].memory_keys.shape[0]
    finished = rows["finished"].view(num_images, -1)
    unfinished = (~finished).sum(1)
    per_image = int(unfinished.max())
    images = unfinished.nonzero()[:, 0]
    share = MAX_SHARE_LEFT_ON_GPU if step.cache.device.type == "cuda" else MAX_SHARE_LEFT
    if len(images) * per_image > share * finished.numel():
        return rows
    indices = finished[images].byte().argsort(dim=1, stable=True)[:, :per_image].sort(dim=1).values
    keep = (images[:, None] * finished.shape[1] + indices).flatten()
    write_back(rows, results)
    step.keep(images, keep)
    return {name: values[keep] for name, values in rows.items()}


def write_back(rows: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """Write the state of the remaining `rows` to the `results` of all rows."""
    if rows is results:
        return
    for name, values in rows.items():
        results[name][rows["index"]] = values

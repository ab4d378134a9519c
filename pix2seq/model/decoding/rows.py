"""What is known of the rows of a generation: a tensor for each thing, with the rows in its first dimension.

Shapes: B images, I prompts an image, S samples a prompt, R = B * I * S rows, C columns, T' new tokens.
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
# Rows leave once they are this share of those there: moving the cache costs about as much as a step.
MAX_SHARE_LEFT = 0.75
MAX_SHARE_LEFT_ON_GPU = 0.5  # where the step is recorded anew for the rows that are left


def arrange_rows(memory_index: Sequence[int], num_samples: int) -> tuple[list[int], Tensor]:
    """Arrange rows in slots of equal size, each for prompts of one image.

    Return the image of each slot, and for each row (R,) its index among the samples of all prompts in their order.
    Negative indices mark fillers: copies of the last prompt that nobody asked for. An image takes several slots
    where larger ones would make more than `MAX_FILLERS` of all rows fillers.
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
    """Return what all prompts (P,) have tokens for, (R, shortest P), and rows of `num_columns` behind it.

    The columns of `tokens` begin with the rest of a longer prompt. `groups` holds a number for each prompt, `order`
    comes from `arrange_rows`; fillers are finished from the start.
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
    """Return numbers in [0, 1), `num_samples` rows of the largest of `lengths` for each prompt, in their order.

    `lengths` holds the most new tokens of each prompt. Numbers move to `device` once, all together.
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
            "give one, one for each image or one for each prompt"
        )
    return torch.cat(drawn).to(device)


def shift(values: Tensor, by: Tensor, width: int) -> Tensor:
    """Columns `by` (R,) and on of values (R, C), (R, width); the outermost column stands for those beyond it."""
    columns = torch.arange(width, device=values.device) + by[:, None]
    return values.gather(1, columns.clamp_(0, values.shape[1] - 1))


def drop_finished(rows: dict[str, Tensor], results: dict[str, Tensor], step: DecoderStep) -> dict[str, Tensor]:
    """Rows without most that are finished, and the cache likewise.

    Every image that is left keeps as many rows as the one with the most unfinished ones, so that its
    rows can go on sharing its memory; some finished rows may stay to fill up.
    """
    num_images = step.cache.layers[0].memory_keys.shape[0]
    finished = rows["finished"].view(num_images, -1)
    unfinished = (~finished).sum(1)
    per_image = int(unfinished.max())
    images = unfinished.nonzero()[:, 0]
    share = MAX_SHARE_LEFT_ON_GPU if step.cache.device.type == "cuda" else MAX_SHARE_LEFT
    if len(images) * per_image > share * finished.numel():
        return rows
    places = finished[images].byte().argsort(dim=1, stable=True)[:, :per_image].sort(dim=1).values
    keep = (images[:, None] * finished.shape[1] + places).flatten()
    write_back(rows, results)
    step.keep(images, keep)
    return {name: values[keep] for name, values in rows.items()}


def write_back(rows: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """Put what is known of `rows` into the `results` of all."""
    if rows is results:
        return
    for name, values in rows.items():
        results[name][rows["index"]] = values

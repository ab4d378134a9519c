"""What is known of the rows of a generation: a tensor for each thing, with the rows in its first dimension.

Shapes: B images, I prompts an image, S samples a prompt, R = B * I * S rows, C columns, T' new tokens.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from pix2seq.model.decoding.kv_cache import KVCache
from pix2seq.vocab import PAD

# Rows leave once they are this share of those there: moving the cache costs about as much as a step.
MAX_SHARE_LEFT = 0.75
MAX_SHARE_LEFT_ON_GPU = 0.5  # where the step is recorded anew for the rows that are left


def new_rows(
    prompts: Sequence[Tensor],
    groups: Sequence[int],
    *,
    num_samples: int,
    num_columns: int,
    with_scores: bool,
) -> tuple[Tensor, dict[str, Tensor]]:
    """What all prompts (P,) have tokens for, (R, shortest P), and rows of `num_columns` behind it.

    The columns of `tokens` begin with the rest of a longer prompt; `groups` holds a number for each prompt.
    """
    shortest = min(len(prompt) for prompt in prompts)
    read = pad_sequence(list(prompts), batch_first=True, padding_value=PAD)
    read = F.pad(read, (0, shortest + num_columns - read.shape[1]), value=PAD).repeat_interleave(num_samples, dim=0)
    device, shape = read.device, (len(read), num_columns)
    rows = {
        "index": torch.arange(len(read), device=device),
        "group": torch.tensor(groups, device=device).repeat_interleave(num_samples),
        "tokens": read[:, shortest:].contiguous(),
        "logprobs": torch.zeros(shape, device=device),
        "finished": torch.zeros(len(read), dtype=torch.bool, device=device),
        "truncated": torch.zeros(len(read), dtype=torch.bool, device=device),
    }
    if with_scores:
        rows["best_tokens"] = torch.full_like(rows["tokens"], PAD)
        rows["best_logprobs"] = torch.full(shape, -torch.inf, device=device)
    return read[:, :shortest], rows


def uniform(
    lengths: Sequence[int],
    num_images: int,
    num_samples: int,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    device: torch.device,
) -> Tensor:
    """Numbers (R, largest of `lengths`) in [0, 1), row by row; `lengths` are those of the prompts' answers."""
    num_rows, longest = len(lengths) * num_samples, max(lengths)
    if generator is None or isinstance(generator, torch.Generator):
        where = device if generator is None else generator.device
        return torch.rand((num_rows, longest), generator=generator, device=where).to(device)
    if len(generator) == len(lengths):
        shapes = [(num_samples, length) for length in lengths]
    elif len(generator) == num_images:
        shapes = [(num_rows // num_images, longest)] * num_images
    else:
        raise ValueError(
            f"{len(generator)} generators were given for {num_images} images and {len(lengths)} prompts; "
            "give one, one for each image or one for each prompt"
        )
    drawn = [
        torch.rand(shape, generator=each, device=each.device) for shape, each in zip(shapes, generator, strict=True)
    ]
    return torch.cat([F.pad(numbers.to(device), (0, longest - numbers.shape[1])) for numbers in drawn])


def shift(values: Tensor, by: Tensor, width: int) -> Tensor:
    """Columns `by` (R,) and on of values (R, C), (R, width); the outermost column stands for those beyond it."""
    columns = torch.arange(width, device=values.device) + by[:, None]
    return values.gather(1, columns.clamp_(0, values.shape[1] - 1))


def drop_finished(rows: dict[str, Tensor], results: dict[str, Tensor], cache: KVCache) -> dict[str, Tensor]:
    """Rows without most that are finished, and the cache likewise.

    Every image that is left keeps as many rows as the one with the most unfinished ones, so that its
    rows can go on sharing its memory; some finished rows may stay to fill up.
    """
    num_images = cache.layers[0].memory_keys.shape[0]
    finished = rows["finished"].view(num_images, -1)
    unfinished = (~finished).sum(1)
    per_image = int(unfinished.max())
    images = unfinished.nonzero()[:, 0]
    share = MAX_SHARE_LEFT_ON_GPU if cache.device.type == "cuda" else MAX_SHARE_LEFT
    if len(images) * per_image > share * finished.numel():
        return rows
    places = finished[images].byte().argsort(dim=1, stable=True)[:, :per_image].sort(dim=1).values
    keep = (images[:, None] * finished.shape[1] + places).flatten()
    write_back(rows, results)
    cache.keep(images, keep)
    return {name: values[keep] for name, values in rows.items()}


def write_back(rows: dict[str, Tensor], results: dict[str, Tensor]) -> None:
    """Put what is known of `rows` into the `results` of all."""
    if rows is results:
        return
    for name, values in rows.items():
        results[name][rows["index"]] = values

"""Samples of feature maps in frames around single objects: a closer look without a second encoding.

Shapes: B images, R frames, C channels of all maps, h x w the grid of an image's features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from pix2seq.model.encoders.encoder import Maps


def sample_maps(maps: Maps, frames: Tensor, image_index: Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Sample maps at the middles of 2 h x 2 w equal cells of each frame, by bilinear interpolation: (R, C, 2 h, 2 w).

    `frames` (R, 4) are `yxyx` in [0, 1] of the image, on the device of the maps; beyond the image, samples are 0.
    `image_index` is the image of each. The reference for sampling without rounding is RoIAlign, arXiv
    1703.06870.
    """
    num_images, device = len(maps[0]), maps[0].device
    # Frames of an image are sampled in one call, one above the other, so that no map is copied for each of them.
    counts = [0] * num_images
    order = []  # of each frame among those of its image
    for image in image_index:
        order.append(counts[image])
        counts[image] += 1
    most = max(counts)
    slots = [image * most + number for image, number in zip(image_index, order, strict=True)]
    index = torch.tensor(slots).to(device, non_blocking=True)
    points = frame_points(frames, grid)
    _, rows, columns, _ = points.shape
    padded = points.new_zeros(num_images * most, rows, columns, 2).index_copy(0, index, points)
    padded = padded.view(num_images, most * rows, columns, 2)
    sampled = [F.grid_sample(each.float(), padded, align_corners=False) for each in maps]
    joined = torch.cat(sampled, dim=1).unflatten(2, (most, rows)).transpose(1, 2)  # (B, most, C, rows, columns)
    return joined.flatten(0, 1).index_select(0, index)


def frame_points(frames: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the middles of 2 h x 2 w equal cells of frames (R, 4), `xy` in [-1, 1] of the image: (R, 2 h, 2 w, 2)."""
    rows, columns = 2 * grid[0], 2 * grid[1]
    y0, x0, y1, x1 = frames.float().unbind(1)
    steps_y = (torch.arange(rows, device=frames.device) + 0.5) / rows
    steps_x = (torch.arange(columns, device=frames.device) + 0.5) / columns
    y = y0[:, None] + (y1 - y0)[:, None] * steps_y  # (R, rows)
    x = x0[:, None] + (x1 - x0)[:, None] * steps_x  # (R, columns)
    return torch.stack(torch.broadcast_tensors(x[:, None, :], y[:, :, None]), dim=-1) * 2 - 1

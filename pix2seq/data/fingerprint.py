"""What a data set holds in one line, equal wherever its folder lies, so that a run notices other data."""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import asdict

import numpy as np

from pix2seq.data.formats.builder import Dataset
from pix2seq.data.formats.shards import ShardIndex

# Of `Annotations`. Named one by one, so that arrays of a later release do not change the fingerprint of old data.
_ARRAYS = (
    *("first", "boxes_xyxy", "labels", "areas", "iscrowd", "ids"),
    *("ring_owner", "first_point", "points", "rle_owner", "first_byte", "rle_counts", "rle_is_list"),
    *("keypoint_owner", "keypoints", "caption_owner", "first_char", "captions"),
)


def fingerprint(data: Dataset | ShardIndex) -> str:
    """Return the number of images and a sha256 of the classes, the names and sizes of images, and all annotations.

    Of shards it covers every byte, through their own sha256. The pixels of single images are not read.
    """
    digest = hashlib.sha256(json.dumps([category.to_json() for category in data.categories]).encode())
    if isinstance(data, ShardIndex):
        digest.update(json.dumps([asdict(shard) for shard in (*data.shards, data.captions_file)]).encode())
    else:
        for image in data.images:
            name = os.path.relpath(image.path, data.root)
            digest.update(f"{image.id} {image.width} {image.height} {name}\n".encode(errors="surrogateescape"))
        for name in _ARRAYS:
            values = np.asarray(getattr(data.annotations, name))
            digest.update(f"{name} {values.dtype} {values.shape}\n".encode())
            digest.update(np.ascontiguousarray(values).reshape(-1).data)
    return f"{len(data)} images, sha256 {digest.hexdigest()[:16]}"

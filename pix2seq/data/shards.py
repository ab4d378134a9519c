"""A data set as tar files of some thousand pictures each, for data too many or too far away for single files.

    train.json, train-000000.tar, train-000001.tar, ...

The tar files are webdataset's: 000000000.jpg is the picture as it was, 000000000.json its `Target`.
`train.json` says which there are, how many samples and bytes each holds, and their sha256. They are read from
a folder or over http, whole and one after the other, so that the cost of a picture does not depend
on how many there are.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray

from pix2seq.data.target import Category, Dataset, ImageRecord, Segmentation, Target
from pix2seq.errors import InputError

FORMAT = 1
_ATTEMPTS = 4  # at a server that does not answer, waiting twice as long each time
_TIMEOUT = 60.0  # seconds without a byte from it


@dataclass(frozen=True)
class Shard:
    """One tar file."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a split."""

    location: str  # folder, or http(s) address of one
    split: str
    categories: tuple[Category, ...]
    shards: tuple[Shard, ...]

    def __len__(self) -> int:
        """Number of pictures."""
        return sum(shard.num_samples for shard in self.shards)

    @classmethod
    def read(cls, location: str | Path, split: str) -> ShardIndex:
        """The shards of a split in a folder, or behind an http(s) address. Raises `InputError` where there are none."""
        name = f"{split}.json"
        try:
            content = json.loads(_fetch(str(location), name))
            if content["format"] != FORMAT:
                raise InputError(f"{location}/{name} has format {content['format']}, expected {FORMAT}; write it anew")
            shards = tuple(Shard(**shard) for shard in content["shards"])
            categories = tuple(Category.from_json(category) for category in content["categories"])
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{location}/{name} is no index of shards ({error!r}); write it anew") from None
        for shard in shards:
            # A name is data: it may not lead out of the folder or to another server.
            if shard.name != os.path.basename(shard.name) or not shard.name.endswith(".tar") or shard.num_samples < 1:
                raise InputError(f"{location}/{name} lists a shard {shard.name!r} that cannot be; write it anew")
        return cls(str(location), split, categories, shards)


@dataclass(frozen=True)
class ShardSample:
    """A picture as it was encoded, and what is known of it; `target.image.path` is its former name only."""

    epoch: int
    image: bytes
    target: Target


class ShardStream:
    """An endless, seeded stream of the samples of a split, which can start anywhere.

    A lane is the part of one reader: with a data loader of W workers on each of R ranks there are
    W x R. Each epoch deals the shards to the lanes anew, and a lane reads `mix` of them at a time and
    permutes their samples; so many are held in memory. What comes at which place depends on seed,
    lane, number of lanes and `mix` alone. `start` skips that many samples of the lane, and reads nothing for
    it but the shards that the next sample is among.
    """

    def __init__(
        self, index: ShardIndex, *, seed: int, lane: int = 0, num_lanes: int = 1, mix: int = 4, start: int = 0
    ) -> None:
        if not 0 <= lane < num_lanes or mix < 1 or start < 0:
            raise ValueError(f"lane {lane} of {num_lanes}, mix {mix} and start {start} make no stream")
        if num_lanes > len(index.shards):
            raise InputError(
                f"{index.location} has {len(index.shards)} shards of split {index.split!r}, too few for {num_lanes} "
                "readers (ranks x workers); use fewer workers, or write smaller shards"
            )
        self.index = index
        self.seed = seed
        self.lane, self.num_lanes = lane, num_lanes
        self.mix = mix
        self.start = start

    def __iter__(self) -> Iterator[ShardSample]:
        skip, epoch = self.start, 0
        while True:
            dealt = np.random.default_rng((self.seed, epoch)).permutation(len(self.index.shards))
            mine = dealt[self.lane :: self.num_lanes].tolist()
            for first in range(0, len(mine), self.mix):
                some = mine[first : first + self.mix]
                size = sum(self.index.shards[i].num_samples for i in some)
                if skip >= size:
                    skip -= size
                    continue
                samples = [sample for i in some for sample in read_shard(self.index.location, self.index.shards[i])]
                order = np.random.default_rng((self.seed, epoch, some[0])).permutation(size)
                for i in order[skip:].tolist():
                    image, target = samples[i]
                    yield ShardSample(epoch, image, _target_from_json(json.loads(target)))
                skip = 0
            epoch += 1


def write_shards(dataset: Dataset, folder: str | Path, *, samples_per_shard: int = 1000) -> ShardIndex:
    """Write a data set as shards. The index comes last, so that a folder with one is whole.

    Raises `InputError` where the split is there already or a picture cannot be read.
    """
    webdataset = _webdataset()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{dataset.split}.json"
    if path.exists():
        raise InputError(f"{path} exists; remove it and its shards, or name another folder")
    shards: list[Shard] = []
    for first in range(0, len(dataset), samples_per_shard):
        name = f"{dataset.split}-{len(shards):06d}.tar"
        numbers = range(first, min(first + samples_per_shard, len(dataset)))
        stream = io.BytesIO()
        # Without time and owner, so that the same data set gives the same bytes.
        with webdataset.TarWriter(stream, mtime=0, user="", group="") as tar:
            for number in numbers:
                target = dataset.target(number)
                suffix = target.image.path.suffix.lstrip(".").lower() or "image"
                try:
                    image = target.image.path.read_bytes()
                except OSError as error:
                    raise InputError(f"{target.image.path} cannot be read: {error}") from None
                label = json.dumps(_target_to_json(target, dataset.root)).encode("utf-8")
                tar.write({"__key__": f"{number:09d}", suffix: image, "json": label})
        content = stream.getvalue()
        _write_whole(folder / name, content)
        shards.append(Shard(name, len(numbers), len(content), hashlib.sha256(content).hexdigest()))
    index = {
        "format": FORMAT,
        "split": dataset.split,
        "categories": [category.to_json() for category in dataset.categories],
        "shards": [asdict(shard) for shard in shards],
    }
    _write_whole(path, json.dumps(index, indent=1).encode("utf-8"))
    return ShardIndex(str(folder), dataset.split, dataset.categories, tuple(shards))


def read_shard(location: str, shard: Shard) -> list[tuple[bytes, bytes]]:
    """Picture and JSON of each sample, in their order. Raises `InputError` where the file is not as it was written."""
    webdataset = _webdataset()
    content = _fetch(location, shard.name)
    if len(content) != shard.num_bytes or hashlib.sha256(content).hexdigest() != shard.sha256:
        raise InputError(
            f"{location}/{shard.name} is damaged: its {len(content)} bytes are not the {shard.num_bytes} "
            "that were written; copy it again"
        )
    files = webdataset.tariterators.tar_file_expander([{"url": shard.name, "stream": io.BytesIO(content)}])
    samples = []
    for sample in webdataset.tariterators.group_by_keys(files):
        label = sample["json"]
        (image,) = (value for key, value in sample.items() if not key.startswith("__") and key != "json")
        samples.append((image, label))
    assert len(samples) == shard.num_samples  # its bytes are as written
    return samples


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise InputError("shards need the package webdataset; install pix2seq[shards]") from None
    return webdataset


def _fetch(location: str, name: str) -> bytes:
    if not location.startswith(("http://", "https://")):
        try:
            return (Path(location) / name).read_bytes()
        except OSError as error:
            raise InputError(f"{location}/{name} cannot be read: {error.strerror}; expected shards there") from None
    address = f"{location.rstrip('/')}/{name}"
    for attempt in range(_ATTEMPTS):
        try:
            with urlopen(address, timeout=_TIMEOUT) as response:
                content: bytes = response.read()
                return content
        except (OSError, HTTPException) as error:  # URLError is an OSError
            reason: Exception = error
            if 400 <= getattr(error, "code", 0) < 500:  # asking again would not help
                break
        if attempt + 1 < _ATTEMPTS:
            time.sleep(2.0**attempt)
    raise InputError(f"{address} cannot be read: {reason}; expected shards there")


def _write_whole(path: Path, content: bytes) -> None:
    """A file that is there in full or not at all."""
    unfinished = path.with_suffix(path.suffix + ".unfinished")
    with unfinished.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(unfinished, path)


def _target_to_json(target: Target, root: Path) -> dict[str, Any]:
    path = target.image.path
    return {
        "image_id": target.image.id,
        "file_name": (path.relative_to(root) if path.is_relative_to(root) else path).as_posix(),
        "width": target.image.width,
        "height": target.image.height,
        "boxes_xyxy": target.boxes_xyxy.tolist(),
        "labels": target.labels.tolist(),
        "areas": target.areas.tolist(),
        "iscrowd": target.iscrowd.tolist(),
        "annotation_ids": target.annotation_ids.tolist(),
        "segmentations": [_plain_mask(segmentation) for segmentation in target.segmentations],
        "keypoints": target.keypoints.tolist(),
        "num_keypoints": target.keypoints.shape[1],
        "captions": list(target.captions),
    }


def _target_from_json(value: dict[str, Any]) -> Target:
    image = ImageRecord(value["image_id"], Path(value["file_name"]), value["width"], value["height"])
    return Target(
        image=image,
        boxes_xyxy=np.array(value["boxes_xyxy"], np.float32).reshape(-1, 4),
        labels=np.array(value["labels"], np.int64),
        areas=np.array(value["areas"], np.float32),
        iscrowd=np.array(value["iscrowd"], np.bool_),
        annotation_ids=np.array(value["annotation_ids"], np.int64),
        segmentations=tuple(_mask(segmentation) for segmentation in value["segmentations"]),
        keypoints=np.array(value["keypoints"], np.float32).reshape(len(value["labels"]), value["num_keypoints"], 3),
        captions=tuple(value["captions"]),
    )


def _plain_mask(segmentation: Segmentation | None) -> Any:
    return [ring.ravel().tolist() for ring in segmentation] if isinstance(segmentation, list) else segmentation


def _mask(value: Any) -> Segmentation | None:
    return [_ring(numbers) for numbers in value] if isinstance(value, list) else value


def _ring(numbers: list[float]) -> NDArray[np.float32]:
    return np.array(numbers, np.float32).reshape(-1, 2)

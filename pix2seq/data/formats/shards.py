"""A data set as tar files of some thousand images each, for data too many or too far away for single files.

    train.json, train-captions.json, train-000000.tar, train-000001.tar, ...

The tar files are webdataset's: 000000000.jpg is the image as it was, 000000000.json its `Target`.
`train.json` says which there are, how many samples and bytes each holds, how many of them a task can learn from,
and their sha256; all captions lie in a file of their own, for the words of a vocabulary. Shards are read
from a folder or over http, whole and one after the other, so that the cost of an image does not
depend on how many there are. Images that cannot be used are left out when shards are written, so
that what each lane of readers gets is known before anything is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pix2seq.data.annotations import contents
from pix2seq.data.dataset import Dataset
from pix2seq.data.defects import MAX_BAD_SHARE, Defect, refuse_bad_share
from pix2seq.data.image import read_record_image
from pix2seq.errors import InputError
from pix2seq.types import Category, ImageRecord, MaskAnnotation, Target

FORMAT = 2
CONTENTS = ("object", "mask", "labelled keypoint", "caption")  # what tasks learn from, see `pix2seq.data.annotations`
_ATTEMPTS = 4  # at a server that does not answer, waiting twice as long each time
_TIMEOUT = 60.0  # seconds without a byte from it


@dataclass(frozen=True)
class Shard:
    """One tar file, or the file of captions."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    num_with: dict[str, int] = field(default_factory=dict)  # samples that have each of `CONTENTS`


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a split."""

    location: str  # folder, or http(s) address of one
    split: str
    categories: tuple[Category, ...]
    shards: tuple[Shard, ...]
    captions_file: Shard

    def __len__(self) -> int:
        """Number of images."""
        return sum(shard.num_samples for shard in self.shards)

    def num_with(self, learns_from: str) -> int:
        """Number of images that have one of `CONTENTS`."""
        return sum(shard.num_with[learns_from] for shard in self.shards)

    def captions(self) -> list[str]:
        """All captions, in order. Raises `InputError` where their file is not as it was written."""
        captions: list[str] = json.loads(_fetch_whole(self.location, self.captions_file))
        return captions

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
            captions_file = Shard(**content["captions_file"])
        except InputError:
            raise
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(f"{location}/{name} is no index of shards ({error!r}); write it anew") from None
        for shard in (*shards, captions_file):
            # A name is data: it may not lead out of the folder or to another server.
            is_tar = shard.name.endswith(".tar") and shard.num_samples >= 1 and set(shard.num_with) == set(CONTENTS)
            if shard.name != os.path.basename(shard.name) or not (is_tar or shard is captions_file):
                raise InputError(f"{location}/{name} lists a file {shard.name!r} that cannot be; write it anew")
        return cls(str(location), split, categories, shards, captions_file)


@dataclass(frozen=True)
class ShardSample:
    """An image as it was encoded, and what is known of it; `target.image.path` is its former name only."""

    epoch: int
    number: int  # in the data set that was written
    image: bytes
    target: Target


class ShardStream:
    """An endless, seeded stream of the samples of a split, which can start anywhere.

    A lane is the part of one reader: with a data loader of W workers on each of R ranks there are
    W x R. Each epoch deals the shards to the lanes anew, and a lane reads `mix` of them at a time and
    permutes their samples; so many are held in memory. What comes at which place depends on seed,
    lane, number of lanes and `mix` alone. `start` skips that many samples of the lane, and reads nothing for
    it but the shards that the next sample is among. Where `learns_from` is one of `CONTENTS`, samples
    without it do not count and do not come.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        lane: int = 0,
        num_lanes: int = 1,
        mix: int = 4,
        start: int = 0,
        learns_from: str | None = None,
    ) -> None:
        if not 0 <= lane < num_lanes or mix < 1 or start < 0:
            raise ValueError(f"lane {lane} of {num_lanes}, mix {mix} and start {start} make no stream")
        if num_lanes > len(index.shards):
            raise InputError(
                f"{index.location} has {len(index.shards)} shards of split {index.split!r}, too few for {num_lanes} "
                "readers (ranks x workers); use fewer workers, or write smaller shards"
            )
        if learns_from is not None and not index.num_with(learns_from):
            raise InputError(f"{index.location} has no {learns_from} to learn from in split {index.split!r}")
        self.index = index
        self.learns_from = learns_from
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
                size = sum(self._size(self.index.shards[i]) for i in some)
                if skip >= size:
                    skip -= size
                    continue
                samples = [sample for i in some for sample in self._read(self.index.shards[i])]
                order = np.random.default_rng((self.seed, epoch, some[0])).permutation(size)
                for i in order[skip:].tolist():
                    number, image, target = samples[i]
                    yield ShardSample(epoch, number, image, _target_from_json(json.loads(target)))
                del samples  # before the next ones are read
                skip = 0
            epoch += 1

    def _size(self, shard: Shard) -> int:
        return shard.num_samples if self.learns_from is None else shard.num_with[self.learns_from]

    def _read(self, shard: Shard) -> Iterator[tuple[int, bytes, bytes]]:
        for number, image, target in read_shard(self.index.location, shard):
            if self.learns_from is None or self.learns_from in contents(_target_from_json(json.loads(target))):
                yield number, image, target


def write_shards(
    dataset: Dataset,
    folder: str | Path,
    *,
    samples_per_shard: int = 500,
    max_bad_share: float = MAX_BAD_SHARE,
    progress: bool = False,
) -> ShardIndex:
    """Write a data set as shards. The index comes last, so that a folder with one is whole.

    An image that cannot be read, or is not of the annotations' size, is named in a warning and left out.
    Raises `InputError` where the split is there already, and where more than `max_bad_share` (0 to 1)
    of the images, and ten or more, are such.
    """
    webdataset = _webdataset()
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{dataset.split}.json"
    if path.exists():
        raise InputError(f"{path} exists; remove it and its shards, or name another folder")
    shards: list[Shard] = []
    bad: list[Defect] = []
    for first in tqdm(range(0, len(dataset), samples_per_shard), unit="shard", disable=not progress):
        numbers = range(first, min(first + samples_per_shard, len(dataset)))
        stream = io.BytesIO()
        num_with = Counter(dict.fromkeys(CONTENTS, 0))
        num_samples = 0
        # Without time and owner, so that the same data set gives the same bytes.
        with webdataset.TarWriter(stream, mtime=0, user="", group="") as tar:
            for number in numbers:
                target = dataset.target(number)
                try:
                    read_record_image(target.image)
                    image = target.image.path.read_bytes()
                except InputError as error:
                    warnings.warn(f"left out: {error}", stacklevel=2)
                    bad.append((target.image.id, None, str(error), "dropped", ""))
                    continue
                suffix = target.image.path.suffix.lstrip(".").lower() or "image"
                label = json.dumps(_target_to_json(target, dataset.root)).encode("utf-8")
                tar.write({"__key__": f"{number:09d}", suffix: image, "json": label})
                num_with.update(contents(target))
                num_samples += 1
        refuse_bad_share("images", bad, len(dataset), where=dataset.root, max_bad_share=max_bad_share)
        if num_samples:
            name = f"{dataset.split}-{len(shards):06d}.tar"
            shards.append(_write_part(folder / name, stream.getvalue(), num_samples, dict(num_with)))
    captions = list(dataset.annotations.all_captions())
    captions_file = _write_part(
        folder / f"{dataset.split}-captions.json", json.dumps(captions).encode("utf-8"), len(captions), {}
    )
    index = {
        "format": FORMAT,
        "split": dataset.split,
        "categories": [category.to_json() for category in dataset.categories],
        "shards": [asdict(shard) for shard in shards],
        "captions_file": asdict(captions_file),
    }
    _write_whole(path, json.dumps(index, indent=1).encode("utf-8"))
    return ShardIndex(str(folder), dataset.split, dataset.categories, tuple(shards), captions_file)


def is_shards(location: str, split: str) -> bool:
    """Whether a folder, or what lies behind any http(s) address, is to be read as shards."""
    names = (f"{split}.json", f"{split}-captions.json")
    return is_address(location) or all((Path(location) / name).is_file() for name in names)


def is_address(location: str) -> bool:
    """Whether a location is an http(s) address rather than a folder."""
    return location.startswith(("http://", "https://"))


def read_shard(location: str, shard: Shard) -> list[tuple[int, bytes, bytes]]:
    """Number, image and JSON of each sample, in their order.

    Raises `InputError` where the file is not as it was written.
    """
    webdataset = _webdataset()
    content = _fetch_whole(location, shard)
    files = webdataset.tariterators.tar_file_expander([{"url": shard.name, "stream": io.BytesIO(content)}])
    samples = []
    for sample in webdataset.tariterators.group_by_keys(files):
        label = sample["json"]
        (image,) = (value for key, value in sample.items() if not key.startswith("__") and key != "json")
        samples.append((int(sample["__key__"]), image, label))
    assert len(samples) == shard.num_samples  # its bytes are as written
    return samples


def _write_part(path: Path, content: bytes, num_samples: int, num_with: dict[str, int]) -> Shard:
    _write_whole(path, content)
    return Shard(path.name, num_samples, len(content), hashlib.sha256(content).hexdigest(), num_with)


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise InputError("shards need the package webdataset; install pix2seq[shards]") from None
    return webdataset


def _fetch_whole(location: str, shard: Shard) -> bytes:
    content = _fetch(location, shard.name)
    if len(content) != shard.num_bytes or hashlib.sha256(content).hexdigest() != shard.sha256:
        raise InputError(
            f"{location}/{shard.name} is damaged: its {len(content)} bytes are not the {shard.num_bytes} "
            "that were written; copy it again"
        )
    return content


def _fetch(location: str, name: str) -> bytes:
    if not is_address(location):
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


def _plain_mask(segmentation: MaskAnnotation | None) -> Any:
    return [ring.ravel().tolist() for ring in segmentation] if isinstance(segmentation, list) else segmentation


def _mask(value: Any) -> MaskAnnotation | None:
    return [_ring(numbers) for numbers in value] if isinstance(value, list) else value


def _ring(numbers: list[float]) -> NDArray[np.float32]:
    return np.array(numbers, np.float32).reshape(-1, 2)

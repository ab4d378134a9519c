"""A data set as tar files of hundreds of images each, for data sets too large or too remote for single files.

    train.json, train-captions.json, train-000000.tar, train-000001.tar, ...

The tar files are in webdataset's format: 000000000.jpg is the unchanged image, 000000000.json its `Target`.
`train.json` lists the shards with their numbers of samples and bytes, the number of samples that each kind
of task can learn from, and their sha256; `train-captions.json` has all captions, to build a vocabulary.
Shards are read from a folder or over http, one at a time and completely, so the cost of an image does not
depend on the size of the data set. Unusable images are left out on writing, so the samples of each reader
are known before anything is read.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from http.client import HTTPException, HTTPMessage, IncompleteRead
from pathlib import Path
from typing import Any
from urllib.request import HTTPRedirectHandler, Request, build_opener

import numpy as np
from tqdm import tqdm

from pix2seq.data.annotations import contents
from pix2seq.data.defects import MAX_BAD_SHARE, Defect, refuse_bad_share
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.image import read_record_image
from pix2seq.errors import InputError
from pix2seq.files import output_folder, parse_json, read_regular, report_write_errors, write_atomically
from pix2seq.geometry.polygons import run_lengths
from pix2seq.types import Category, ImageRecord, MaskAnnotation, Target

FORMAT = 2
CONTENTS = ("object", "mask", "labelled keypoint", "caption")  # values of `Task.learns_from`
MAX_INDEX_BYTES = 1 << 30
_ATTEMPTS = 4  # requests to a server that does not answer, with doubling waits between them
_TIMEOUT = 60.0  # seconds without a byte from the server


@dataclass(frozen=True)
class Shard:
    """One tar file, or the file of captions."""

    name: str
    num_samples: int
    num_bytes: int
    sha256: str
    num_with: dict[str, int] = field(default_factory=dict)  # number of samples with each of `CONTENTS`


@dataclass(frozen=True)
class ShardIndex:
    """The shards of a split."""

    location: str  # a folder or its http(s) address
    split: str
    categories: tuple[Category, ...]
    shards: tuple[Shard, ...]
    captions_file: Shard
    attributes: tuple[Mapping[str, str], ...] = ()  # the different descriptions of objects by `ATTRIBUTES`

    def __len__(self) -> int:
        """Number of images."""
        return sum(shard.num_samples for shard in self.shards)

    def num_with(self, learns_from: str) -> int:
        """Return the number of images with `learns_from`, one of `CONTENTS`."""
        return sum(shard.num_with[learns_from] for shard in self.shards)

    def captions(self) -> list[str]:
        """Read all captions, in order. Raises `InputError` if their file has changed since it was written."""
        name = f"{self.location}/{self.captions_file.name}"
        try:
            captions = parse_json(_fetch_verified(self.location, self.captions_file))
        except InputError:
            raise
        except ValueError as error:
            raise InputError(f"{name} holds no captions ({error}); write the shards again") from None
        if not isinstance(captions, list) or not all(isinstance(text, str) for text in captions):
            raise InputError(f"{name} holds no list of captions; write the shards again")
        return captions

    @classmethod
    def read(cls, location: str | Path, split: str) -> ShardIndex:
        """Read the index of a split in a folder or at an http(s) address. Raises `InputError` if it cannot be used."""
        name = f"{split}.json"
        content = _fetch(str(location), name, MAX_INDEX_BYTES)
        try:
            index = parse_json(content)
            if index["format"] != FORMAT:
                raise InputError(f"{location}/{name} has format {index['format']!r}, expected {FORMAT}; write it again")
            shards = tuple(Shard(**shard) for shard in index["shards"])
            categories = tuple(Category.from_json(category) for category in index["categories"])
            captions_file = Shard(**index["captions_file"])
            attributes = tuple(dict(each) for each in index.get("attributes", ()))
            _check_index(shards, captions_file, categories)
        except InputError:
            raise
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{location}/{name} is not an index of shards ({error!r}); write it again") from None
        return cls(str(location), split, categories, shards, captions_file, attributes)


def _check_index(shards: Sequence[Shard], captions_file: Shard, categories: Sequence[Category]) -> None:
    """Raise `ValueError` for an entry that `write_shards` would not write: an index is data from elsewhere.

    A name must not lead out of the folder or to another server, and numbers decide about memory.
    """
    for shard in (*shards, captions_file):
        name, is_tar = shard.name, shard is not captions_file
        numbers = (shard.num_samples, shard.num_bytes, *shard.num_with.values())
        if not isinstance(name, str) or not name or name != os.path.basename(name) or "\\" in name or name[0] == ".":
            raise ValueError(f"invalid entry for the file {name!r}")
        if any(type(number) is not int or number < 0 for number in numbers) or not isinstance(shard.sha256, str):
            raise ValueError(f"invalid entry for the file {name!r}: {asdict(shard)}")
        if is_tar and not (
            name.endswith(".tar")
            and 1 <= shard.num_samples <= shard.num_bytes // tarfile.BLOCKSIZE
            and set(shard.num_with) == set(CONTENTS)
            and max(shard.num_with.values()) <= shard.num_samples
        ):
            raise ValueError(f"invalid entry for the file {name!r}: {asdict(shard)}")
    if len({shard.name for shard in shards}) < len(shards):
        raise ValueError("invalid entry: two shards have one name")
    if len({category.label for category in categories}) < len(categories):
        raise ValueError("two classes have one label")


@dataclass(frozen=True)
class ShardSample:
    """An encoded image and its annotations; `target.image.path` is only its original name."""

    epoch: int
    number: int  # index in the original data set
    image: bytes
    target: Target


class ShardStream:
    """An endless, seeded stream of the samples of a split for one of `num_readers` readers; it can start anywhere.

    A data loader of W workers on each of R ranks has W x R readers. Each epoch deals the shards to the
    readers in a new order. A reader holds `mix` shards in memory at a time and permutes their samples.
    The order depends only on seed, reader, number of readers and `mix`. `start` skips that many samples
    of the reader, and only the shards around the next sample are read. If `learns_from` is one of
    `CONTENTS`, samples without it are left out and not counted.
    """

    def __init__(
        self,
        index: ShardIndex,
        *,
        seed: int,
        reader: int = 0,
        num_readers: int = 1,
        mix: int = 4,
        start: int = 0,
        learns_from: str | None = None,
    ) -> None:
        if not 0 <= reader < num_readers or mix < 1 or start < 0:
            raise ValueError(f"reader {reader} of {num_readers}, mix {mix} and start {start} are out of range")
        if num_readers > len(index.shards):
            raise InputError(
                f"{index.location} has {len(index.shards)} shards of split {index.split!r}, too few for {num_readers} "
                "readers (ranks x workers); use fewer workers, or write smaller shards"
            )
        if learns_from is not None and not index.num_with(learns_from):
            raise InputError(f"{index.location} has no {learns_from} to learn from in split {index.split!r}")
        self.index = index
        self.learns_from = learns_from
        self.seed = seed
        self.reader, self.num_readers = reader, num_readers
        self.mix = mix
        self.start = start

    def __iter__(self) -> Iterator[ShardSample]:
        skip, epoch = self.start, 0
        while True:
            dealt = np.random.default_rng((self.seed, epoch)).permutation(len(self.index.shards))
            mine = dealt[self.reader :: self.num_readers].tolist()
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
                    yield ShardSample(epoch, number, image, target)
                del samples  # free the memory before the next shards are read
                skip = 0
            epoch += 1

    def _size(self, shard: Shard) -> int:
        return shard.num_samples if self.learns_from is None else shard.num_with[self.learns_from]

    def _read(self, shard: Shard) -> Iterator[tuple[int, bytes, Target]]:
        for number, image, target in read_shard(self.index.location, shard):
            if self.learns_from is None or self.learns_from in contents(target):
                yield number, image, target


def write_shards(
    dataset: Dataset,
    folder: str | Path,
    *,
    samples_per_shard: int = 500,
    max_bad_share: float = MAX_BAD_SHARE,
    progress: bool = False,
) -> ShardIndex:
    """Write a data set as shards. The index is written last, so a folder with an index is complete.

    An image that cannot be read, or differs in size from its annotations, is named in a warning and left
    out. Raises `InputError` if the split exists already, or if ten or more images, and more than
    `max_bad_share` (0 to 1) of them, are bad.
    """
    webdataset = _webdataset()
    folder = output_folder(Path(folder))
    path = folder / f"{dataset.split}.json"
    if path.exists():
        raise InputError(f"{path} exists already; remove it and its shards, or name another folder")
    shards: list[Shard] = []
    bad: list[Defect] = []
    for first in tqdm(range(0, len(dataset), samples_per_shard), unit="shard", disable=not progress):
        numbers = range(first, min(first + samples_per_shard, len(dataset)))
        stream = io.BytesIO()
        num_with = Counter(dict.fromkeys(CONTENTS, 0))
        num_samples = 0
        # No time and no owner, so that the same data set gives the same bytes.
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
        "attributes": list(dataset.annotations.attribute_kinds),
    }
    _write(path, json.dumps(index, indent=1))
    attributes = dataset.annotations.attribute_kinds
    return ShardIndex(str(folder), dataset.split, dataset.categories, tuple(shards), captions_file, attributes)


def is_shards(location: str, split: str) -> bool:
    """Return whether a location holds shards; any http(s) address counts as shards."""
    names = (f"{split}.json", f"{split}-captions.json")
    return is_address(location) or all((Path(location) / name).is_file() for name in names)


def is_address(location: str) -> bool:
    """Return whether a location is an http(s) address rather than a folder."""
    return location.startswith(("http://", "https://"))


def read_shard(location: str, shard: Shard) -> list[tuple[int, bytes, Target]]:
    """Read the number, the image and the annotations of each sample, in file order.

    Raises `InputError` if the file has changed since it was written, or is not one that `write_shards` wrote.
    """
    content = _fetch_verified(location, shard)
    try:
        samples = [(number, image, _target_from_json(parse_json(label))) for number, image, label in _read_tar(content)]
        if len(samples) != shard.num_samples:
            raise ValueError(f"it has {len(samples)} samples, expected {shard.num_samples}")
    except (tarfile.TarError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{location}/{shard.name} is not a shard ({reason}); write the shards again") from None
    return samples


def _read_tar(content: bytes) -> Iterator[tuple[int, bytes, bytes]]:
    """Yield number, image and label of each sample of an uncompressed tar file: two members of one key."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            key, _, suffix = member.name.partition(".")
            # A sparse member of a few bytes may claim to be of any size.
            if not member.isreg() or member.issparse() or not 0 <= member.size <= len(content):
                raise ValueError(f"its member {member.name!r} is no plain file")
            file = tar.extractfile(member)
            assert file is not None  # it is a plain file
            found.setdefault(key, {})["json" if suffix == "json" else "image"] = file.read()
    for key, files in found.items():
        if not key.isdecimal() or set(files) != {"json", "image"}:
            raise ValueError(f"its sample {key!r} is not an image with a label")
        yield int(key), files["image"], files["json"]


def _write_part(path: Path, content: bytes, num_samples: int, num_with: dict[str, int]) -> Shard:
    _write(path, content)
    return Shard(path.name, num_samples, len(content), hashlib.sha256(content).hexdigest(), num_with)


def _write(path: Path, content: str | bytes) -> None:
    with report_write_errors(path, "writing shards", num_bytes=len(content), then="run the command again"):
        write_atomically(path, content)


def _webdataset() -> Any:
    try:
        import webdataset
    except ImportError:
        raise InputError("shards need the package webdataset; install pix2seq[shards]") from None
    return webdataset


def _fetch_verified(location: str, shard: Shard) -> bytes:
    content = _fetch(location, shard.name, shard.num_bytes)
    if len(content) != shard.num_bytes or hashlib.sha256(content).hexdigest() != shard.sha256:
        raise InputError(
            f"{location}/{shard.name} is damaged: its {len(content)} bytes differ from the {shard.num_bytes} "
            "that were written; copy it again"
        )
    return content


def _fetch(location: str, name: str, max_bytes: int) -> bytes:
    """Return the content of a file; of a file on a server that is longer than `max_bytes`, one byte more than these."""
    if not is_address(location):
        try:
            return read_regular(Path(location) / name)
        except OSError as error:
            raise InputError(f"{location}/{name} cannot be read: {error.strerror}; expected shards there") from None
    address = f"{location.rstrip('/')}/{name}"
    for attempt in range(_ATTEMPTS):
        try:
            with build_opener(_Redirect).open(address, timeout=_TIMEOUT) as response:
                content: bytes = response.read(max_bytes + 1)
                if response.length and len(content) <= max_bytes:
                    raise IncompleteRead(content, response.length)
                return content
        except (OSError, HTTPException) as error:  # URLError is an OSError
            reason: Exception = error
            if 300 <= getattr(error, "code", 0) < 500:  # another attempt would not help
                break
        if attempt + 1 < _ATTEMPTS:
            time.sleep(2.0**attempt)
    raise InputError(f"{address} cannot be read: {reason}; expected shards there")


class _Redirect(HTTPRedirectHandler):
    """Follows redirects to http and https only, and never from https to http."""

    def redirect_request(
        self, req: Request, fp: Any, code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> Request | None:
        if not newurl.startswith(("https://", f"{req.type}://")):
            raise InputError(f"{req.full_url} leads to {newurl}, which is not read; give an http(s) address of shards")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


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
        "segmentations": [_mask_to_json(segmentation) for segmentation in target.segmentations],
        "keypoints": target.keypoints.tolist(),
        "num_keypoints": target.keypoints.shape[1],
        "captions": list(target.captions),
        **({"attributes": list(target.attributes)} if target.attributes else {}),
    }


def _target_from_json(value: dict[str, Any]) -> Target:
    """Read what `_target_to_json` wrote. Raises `ValueError`, `TypeError` or `KeyError` for anything else."""
    number, width, height = value["image_id"], value["width"], value["height"]
    if any(type(side) is not int for side in (number, width, height)) or min(width, height) < 1:
        raise ValueError(f"image {number!r} has width {width!r} and height {height!r}")
    labels = np.array(value["labels"], np.int64)
    count, num_keypoints = len(labels), value["num_keypoints"]
    target = Target(
        image=ImageRecord(number, Path(value["file_name"]), width, height),
        boxes_xyxy=np.array(value["boxes_xyxy"], np.float32).reshape(count, 4),
        labels=labels.reshape(count),
        areas=np.array(value["areas"], np.float32).reshape(count),
        iscrowd=np.array(value["iscrowd"], np.bool_).reshape(count),
        annotation_ids=np.array(value["annotation_ids"], np.int64).reshape(count),
        segmentations=tuple(_mask_from_json(entry, width, height) for entry in value["segmentations"]),
        keypoints=np.array(value["keypoints"], np.float32).reshape(count, num_keypoints, 3),
        captions=tuple(value["captions"]),
        attributes=tuple(value.get("attributes", ())),
    )
    x0, y0, x1, y1 = target.boxes_xyxy.T
    if not ((x0 >= 0) & (x0 < x1) & (x1 <= width) & (y0 >= 0) & (y0 < y1) & (y1 <= height)).all():
        raise ValueError(f"image {number} has a box that does not lie in it")
    if labels.min(initial=1) < 1 or len(target.segmentations) != count or not np.isfinite(target.areas).all():
        raise ValueError(f"image {number} has an object without label, mask or area")
    if not (np.isfinite(target.keypoints).all() and np.isin(target.keypoints[..., 2], (0, 1, 2)).all()):
        raise ValueError(f"image {number} has a keypoint that is not x, y and 0, 1 or 2")
    if not all(isinstance(text, str) for text in target.captions):
        raise ValueError(f"image {number} has a caption that is no text")
    return target


def _mask_to_json(segmentation: MaskAnnotation | None) -> Any:
    return [ring.ravel().tolist() for ring in segmentation] if isinstance(segmentation, list) else segmentation


def _mask_from_json(value: Any, width: int, height: int) -> MaskAnnotation | None:
    if value is None:
        return None
    if isinstance(value, list):
        rings = [np.array(numbers, np.float32).reshape(-1, 2) for numbers in value]
        if not rings or min(map(len, rings)) < 3 or not all(np.isfinite(ring).all() for ring in rings):
            raise ValueError("a mask has a ring that is not three or more points")
        return rings
    lengths = run_lengths(value["counts"])
    if value["size"] != [height, width] or lengths is None or lengths.sum() != height * width:
        raise ValueError("a mask is an RLE that does not fill its image")
    return {"size": [height, width], "counts": value["counts"]}

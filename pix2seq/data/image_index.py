"""An index of the images of a folder: an embedding of each, to be searched.

    index.json, images-000000.safetensors, images-000001.safetensors, ...

index.json says which model embedded the images of which folder. Each other file holds some hundred embeddings and, in
its header, the names, sizes and modification times of their images. Files are written as a whole, so a process that is
killed at any moment leaves an index that can be read and extended. An image in two files counts once, by the later one.

Shapes: E numbers of an embedding, N images of the index, n images of a file.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from pix2seq.errors import InputError
from pix2seq.files import (
    fsync_folder,
    output_folder,
    read_json,
    report_write_errors,
    write_atomically,
    write_tensors,
)

INDEX_FILE = "index.json"
FORMAT = 1  # of index.json
SHARD_IMAGES = 1024  # of a file, at most; also how many are encoded again after a kill
_PATTERN = "images-*.safetensors"
_KEY = "embeddings"


class Stamp(NamedTuple):
    """A file at the time it was embedded; a change of it shows in its size or its time."""

    name: str  # path below the folder of the images, with slashes
    num_bytes: int
    mtime_ns: int


@dataclass(frozen=True)
class _Shard:
    path: Path
    images: list[Stamp]
    embeddings: Tensor  # (n, E) float16, mapped from the file

    @property
    def number(self) -> int:
        return int(self.path.stem.rpartition("-")[2])


class ImageIndex:
    """Embeddings of images, as float16 in files that are mapped, and which image each of them is of."""

    def __init__(self, folder: Path) -> None:
        """Open an index. Raises `InputError` if there is none, if it is of a newer format, or if a file is damaged."""
        self.folder = folder
        if not (folder / INDEX_FILE).is_file():
            raise InputError(
                f"{folder} is no index: it has no {INDEX_FILE}; write one with: pix2seq index FOLDER --checkpoint DIR "
                f"--out {folder}"
            )
        try:
            content = read_json(folder / INDEX_FILE)
            if content["format"] > FORMAT:
                raise InputError(
                    f"{folder / INDEX_FILE} has format {content['format']}, this release reads up to {FORMAT}; install "
                    "a newer pix2seq"
                )
            self.root = Path(content["folder"])
            self.checkpoint, self.model = str(content["checkpoint"]), str(content["model"])
        except (KeyError, TypeError) as error:
            raise InputError(f"{folder / INDEX_FILE} is no file of an index ({error!r}); write another index") from None
        self._read_shards()

    @classmethod
    def create(cls, folder: Path, *, root: Path, checkpoint: Path, model: str) -> Self:
        """Write the head of an index of the images below `root`, new or moved; embeddings that are there stay."""
        content = {"format": FORMAT, "folder": str(root), "checkpoint": str(checkpoint), "model": model}
        output_folder(folder)
        with report_write_errors(folder, "writing an index", then="run the command again"):
            write_atomically(folder / INDEX_FILE, json.dumps(content, indent=2) + "\n")
        return cls(folder)

    def __len__(self) -> int:
        """Number of images."""
        return len(self.stamps)

    def nearest(self, query: NDArray[np.float32], count: int) -> list[tuple[str, float]]:
        """Return the images whose embeddings are most like a unit vector (E,), with their cosine, best first.

        The search is exact, in blocks of a file each. Images of the same cosine come in the order of the index.
        """
        if self._shards and query.shape != self._shards[0].embeddings.shape[1:]:
            raise InputError(
                f"{self.folder} holds embeddings of {self._shards[0].embeddings.shape[1]} numbers, the question has "
                f"shape {query.shape}; ask with the model that wrote the index"
            )
        vector = torch.from_numpy(query)
        parts = [(shard.embeddings.float() @ vector).numpy() for shard in self._shards]
        scores = np.concatenate([*parts, np.zeros(0, np.float32)])[self.rows]
        count = min(count, len(scores))
        if not count:
            return []
        least = np.partition(scores, -count)[-count]
        best = np.flatnonzero(scores >= least)
        best = best[np.argsort(-scores[best], kind="stable")][:count]
        return [(self._names[row], float(scores[i])) for i, row in zip(best, self.rows[best], strict=True)]

    def add(self, images: Sequence[Stamp], embeddings: NDArray[np.float32]) -> None:
        """Add a file of images with their embeddings (n, E); they take the place of earlier ones of the same names."""
        self._append(self._write(self._next_number(), images, torch.from_numpy(embeddings).half()))

    def keep(self, names: Collection[str]) -> None:
        """Drop all images but `names`, join small files, and remove what a killed process left half written."""
        for path in self.folder.glob(f".partial-{_PATTERN}"):
            path.unlink(missing_ok=True)
        wanted, rows = set(names), np.zeros(len(self._names), np.bool_)
        rows[self.rows] = [self._names[row] in wanted for row in self.rows]
        ends = np.cumsum([len(shard.images) for shard in self._shards])
        kept = {s.path: rows[end - len(s.images) : end] for s, end in zip(self._shards, ends, strict=True)}
        loose = [s for s in self._shards if not kept[s.path].all() or len(s.images) < SHARD_IMAGES // 2]
        if len(loose) < 2 and all(kept[shard.path].all() for shard in loose):
            return
        images = [stamp for s in loose for stamp, stays in zip(s.images, kept[s.path], strict=True) if stays]
        embeddings = torch.cat([shard.embeddings[torch.from_numpy(kept[shard.path])] for shard in loose])
        for number, start in enumerate(range(0, len(images), SHARD_IMAGES), self._next_number()):
            stop = start + SHARD_IMAGES
            self._write(number, images[start:stop], embeddings[start:stop])
        for shard in loose:  # last: an image in both files counts once
            shard.path.unlink(missing_ok=True)
        fsync_folder(self.folder)
        self._read_shards()

    def check_model(self, model: str) -> None:
        """Raise `InputError` unless the embeddings are those of the model with this fingerprint."""
        if model != self.model:
            raise InputError(
                f"{self.folder} was written with another model ({self.model[:12]}, this one is {model[:12]}); use "
                f"{self.checkpoint}, or write an index of its own with pix2seq index"
            )

    def _read_shards(self) -> None:
        self._shards: list[_Shard] = []
        self._names: list[str] = []  # of all embeddings, in the order of the files
        self._last: dict[str, int] = {}  # of each image, the embedding that counts
        self.stamps: dict[str, Stamp] = {}  # by name: the images as they were when they were embedded
        for shard in sorted(map(self._open, self.folder.glob(_PATTERN)), key=lambda shard: shard.number):
            self._append(shard)

    def _append(self, shard: _Shard) -> None:
        if self._shards and shard.embeddings.shape[1] != self._shards[0].embeddings.shape[1]:
            raise InputError(f"{self.folder} holds embeddings of different sizes; remove it, and write the index again")
        self._shards.append(shard)
        self._last |= {stamp.name: row for row, stamp in enumerate(shard.images, start=len(self._names))}
        self._names += [stamp.name for stamp in shard.images]
        self.stamps |= {stamp.name: stamp for stamp in shard.images}
        self.__dict__.pop("rows", None)

    @cached_property
    def rows(self) -> NDArray[np.int64]:
        """Of all embeddings those that count, one for each image, ascending (N,)."""
        return np.array(sorted(self._last.values()), np.int64)

    def _open(self, path: Path) -> _Shard:
        try:
            with safe_open(path, framework="pt") as file:
                header: dict[str, Any] = file.metadata() or {}
                images = [Stamp(str(name), int(size), int(time)) for name, size, time in json.loads(header["images"])]
                embeddings = file.get_tensor(_KEY)
            number = int(path.stem.rpartition("-")[2])
            if header["model"] != self.model or embeddings.ndim != 2 or len(embeddings) != len(images) or number < 0:
                raise ValueError("its images or its model are others")
            if any(os.path.isabs(image.name) or ".." in image.name.split("/") for image in images):
                raise ValueError("it names images outside the folder")
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it, and run pix2seq index again") from None
        return _Shard(path, images, embeddings)

    def _next_number(self) -> int:
        return max((shard.number for shard in self._shards), default=-1) + 1

    def _write(self, number: int, images: Sequence[Stamp], embeddings: Tensor) -> _Shard:
        path = self.folder / f"images-{number:06d}.safetensors"
        header = {"model": self.model, "images": json.dumps(images)}
        with report_write_errors(path, "writing an index", num_bytes=embeddings.nbytes, then="run the command again"):
            write_tensors(path, {_KEY: embeddings}, header)
        return self._open(path)

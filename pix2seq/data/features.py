"""Stored features: each image of a split is encoded once, and training reads the features instead of the image.

    features-train.json, features-train-00000.safetensors, features-train-00001.safetensors, ...

A file holds the features of some hundred MB of images, and is memory-mapped, so that reading an image touches only its
own bytes. The index is written last, so features with an index are complete.

Shapes: I images, K variants of each, N features of width D.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from pix2seq.data.defects import MAX_BAD_SHARE, Defect, refuse_bad_share
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.image import read_record_image
from pix2seq.data.read_ahead import read_batches_ahead
from pix2seq.data.transforms import AugmentConfig, augmented_pixels, random_affine
from pix2seq.errors import InputError
from pix2seq.files import free_bytes, output_folder, report_write_errors, write_atomically, write_tensors
from pix2seq.geometry.affine import Affine
from pix2seq.types import ImageRecord

FORMAT = 1  # of the index
SHARD_BYTES = 256 << 20
_DTYPES = {"float16": torch.float16, "float32": torch.float32}


@dataclass(frozen=True)
class StoredImage:
    """The features of one image in all its variants, and the map from the image to each of them."""

    features: Tensor  # (K, N, D), mapped from a file
    affines: NDArray[np.float64]  # (K, 4), the fields of `Affine`

    def draw(self, rng: np.random.Generator) -> tuple[Affine, NDArray[Any]]:
        """Draw a variant; return its map and its features (N, D)."""
        variant = int(rng.integers(len(self.affines))) if len(self.affines) > 1 else 0
        return Affine(*self.affines[variant].tolist()), self.features[variant].numpy()


class FeatureStore:
    """The features of a split, by image. Worker processes map the same files."""

    def __init__(self, folder: Path, split: str) -> None:
        """Open a folder that `write_features` wrote. Raises `InputError` if a file is missing, truncated or newer."""
        self.folder, self.split = Path(folder), split
        path = self.folder / _index_name(split)
        try:
            self.index: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            if self.index["format"] > FORMAT:
                raise InputError(f"{path} has format {self.index['format']}, this release reads up to {FORMAT}")
            images = np.array(self.index["images"], np.int64).reshape(-1, 3)
            self._affines = np.array(self.index["affines"], np.float64)  # (I, K, 4)
            self._left_out = frozenset(self.index["left_out"])
            shards = [(str(shard["name"]), int(shard["bytes"])) for shard in self.index["shards"]]
            self._first = np.cumsum([0, *(shard["num_images"] for shard in self.index["shards"])])
        except FileNotFoundError:
            raise InputError(
                f"{self.folder} has no {path.name}; write it with: pix2seq data features DATA {self.folder} "
                f"--split {split}"
            ) from None
        except InputError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} is not an index of features ({error!r}); write the features again") from None
        self._order = np.argsort(images[:, 0])
        self._images = images[self._order]  # id, width and height, ascending by id
        self._shards = [self._open_shard(*shard) for shard in shards]

    def __reduce__(self) -> tuple[Any, ...]:
        return FeatureStore, (self.folder, self.split)

    def __len__(self) -> int:
        """Number of images."""
        return len(self._images)

    @property
    def num_bytes(self) -> int:
        """Bytes of all features on disk."""
        return sum(int(shard["bytes"]) for shard in self.index["shards"])

    @property
    def mirrored(self) -> bool:
        """Whether some of the features are of mirrored images."""
        return bool((self._affines[..., 0] < 0).any())  # the scale of x

    def read(self, image: ImageRecord) -> StoredImage:
        """Return the features of an image. Raises `InputError` if it was unreadable when they were written."""
        if image.id in self._left_out:
            raise InputError(f"{image.path} was unreadable when {self.folder} was written")
        row = int(self._order[self._images[:, 0].searchsorted(image.id)])
        shard = int(self._first.searchsorted(row, side="right")) - 1
        return StoredImage(self._shards[shard][row - int(self._first[shard])], self._affines[row])

    def check_encoder(self, fingerprint: str) -> None:
        """Raise `InputError` unless the features are those of the encoder with this fingerprint."""
        if fingerprint != self.index["fingerprint"]:
            raise InputError(
                f"features={self.folder} are of another encoder ({self.index['encoder']['name']}, weights "
                f"{self.index['fingerprint'][:12]}, this run has {fingerprint[:12]}); start from the checkpoint that "
                "they were written with (init=CHECKPOINT), or write them again"
            )

    def check_images(self, images: Sequence[ImageRecord], image_size: tuple[int, int]) -> None:
        """Raise `InputError` unless there are features of all `images`, at the run's image size."""
        ours, theirs = list(image_size), self.index["variants"]["size"]
        if ours != theirs:
            raise InputError(
                f"features={self.folder} are of images at {theirs[0]}x{theirs[1]}, but model.image_size is "
                f"{ours[0]}x{ours[1]}; set model.image_size=[{theirs[0]},{theirs[1]}], or write them again"
            )
        known = set(map(tuple, self._images.tolist()))
        missing = [i.id for i in images if (i.id, i.width, i.height) not in known and i.id not in self._left_out]
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(
                f"features={self.folder} have no image {missing[0]}{more} of the data at its size; they are of other "
                "data: write them again"
            )

    def _open_shard(self, name: str, num_bytes: int) -> Tensor:
        path = self.folder / Path(name).name
        try:
            found = path.stat().st_size
            if found != num_bytes:
                raise InputError(f"{path} has {found} bytes, expected {num_bytes}; remove it and write the rest again")
            return _map_shard(path)[0]["features"]
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path} cannot be read ({error}); remove it and write the rest again") from None


@dataclass(frozen=True)
class Variants:
    """How an image becomes what the encoder sees, `count` times; with one variant, it is only resized."""

    size: tuple[int, int]
    augment: AugmentConfig
    scale_range: tuple[float, float] = (0.3, 2.0)
    count: int = 1
    seed: int = 0

    def __post_init__(self) -> None:
        if self.count > 1 and not self.augment.enabled:
            raise InputError(
                f"{self.count} augmentations with augment.enabled=false would all be the same; set it to true, or ask "
                "for one"
            )
        self.augment.scales(self.scale_range)

    def settings(self) -> dict[str, Any]:
        """Return all that decides about pixels and maps."""
        settings = asdict(self) | {"size": list(self.size), "scale_range": list(self.scale_range)}
        return settings if self.count > 1 else {"size": settings["size"], "count": 1}

    def of(self, pixels: NDArray[np.uint8], number: int) -> list[tuple[NDArray[np.uint8], Affine]]:
        """Return the variants of image `number`: each is a function of seed, variant and number."""
        augment = self.augment if self.count > 1 else replace(self.augment, enabled=False)
        variants = []
        for variant in range(self.count):
            rng = np.random.default_rng((self.seed, variant, number))
            affine = random_affine(pixels.shape[:2], self.size, augment, rng, scale_range=self.scale_range)
            variants.append((augmented_pixels(pixels, affine, self.size, augment, rng), affine))
        return variants


def write_features(
    dataset: Dataset,
    out: Path,
    encode: Callable[[Tensor], Tensor],
    variants: Variants,
    *,
    encoder: Mapping[str, Any],
    batch_size: int = 16,
    max_bad_share: float = MAX_BAD_SHARE,
    shard_bytes: int = SHARD_BYTES,
    dtype: str = "float16",
    progress: bool = False,
) -> FeatureStore:
    """Encode all images of a data set and store the features; go on where an earlier call was killed.

    `encode` maps images (B, 3, H, W) uint8 to features (B, N, D) on the host. The index says of the `encoder`: its
    settings as `encoder`, its `fingerprint`, and more. An image that cannot be read is named in a warning and left out.
    Raises `InputError` if the disk is too small, if `out` holds other features, or as `refuse_bad_share` says.
    """
    images, count = dataset.images, variants.count
    num_features, dim = encode(torch.zeros(1, 3, *variants.size, dtype=torch.uint8)).shape[1:]
    image_bytes = count * num_features * dim * _DTYPES[dtype].itemsize
    per_shard = max(shard_bytes // image_bytes // batch_size, 1) * batch_size
    settings = {"format": FORMAT, **encoder, "dtype": dtype, "variants": variants.settings()}
    content = json.dumps([settings, per_shard, [(image.id, image.width, image.height) for image in images]])
    key = hashlib.sha256(content.encode()).hexdigest()
    shards = {
        out / f"features-{dataset.split}-{number:05d}.safetensors": range(first, min(first + per_shard, len(images)))
        for number, first in enumerate(range(0, len(images), per_shard))
    }
    output_folder(out)
    whole = {path for path in shards if _is_whole(path, key)}
    print(
        f"{len(images)} images, {count} x {num_features} features of {dim} numbers in {dtype}: {image_bytes} bytes an "
        f"image, {len(images) * image_bytes} bytes ({len(images) * image_bytes / 1e9:.2f} GB) in {len(shards)} files "
        f"in {out}" + (f", {len(whole)} of them written before" if whole else ""),
        flush=True,
    )
    needed = sum(len(numbers) for path, numbers in shards.items() if path not in whole) * image_bytes
    if free_bytes(out) < needed:
        raise InputError(f"{out} needs {needed} bytes, {free_bytes(out)} are free; free space, or name another folder")

    bad: list[Defect] = []
    with tqdm(total=len(images), unit="image", disable=not progress) as bar:
        for path, numbers in shards.items():
            if path in whole:
                bar.update(len(numbers))
                continue
            features = torch.empty(len(numbers), count, num_features, dim, dtype=_DTYPES[dtype])
            rows: list[tuple[int, int, int]] = []
            affines: list[list[tuple[float, ...]]] = []
            batches = [numbers[start : start + batch_size] for start in range(0, len(numbers), batch_size)]
            for batch in read_batches_ahead(batches, lambda number: read_record_image(images[number]), ahead=2):
                inputs, first = [], len(rows)
                for number, pixels in batch:
                    image = images[number]
                    if isinstance(pixels, InputError):
                        warnings.warn(f"left out: {pixels}", stacklevel=2)
                        bad.append((image.id, None, str(pixels), "dropped", ""))
                        continue
                    warped, maps = zip(*variants.of(pixels, number), strict=True)
                    inputs.append(np.stack(warped))
                    rows.append((image.id, image.width, image.height))
                    affines.append([astuple(affine) for affine in maps])
                refuse_bad_share("images", bad, len(images), where=dataset.root, max_bad_share=max_bad_share)
                for variant in range(count if inputs else 0):
                    some = torch.from_numpy(np.stack([each[variant] for each in inputs])).permute(0, 3, 1, 2)
                    features[first : len(rows), variant] = encode(some.contiguous()).to(features.dtype)
                if not features[first : len(rows)].isfinite().all():
                    raise InputError(f"features of image {rows[first][0]} or one after it are too large for {dtype}")
                bar.update(len(batch))
            tensors = {
                "features": features[: len(rows)],
                "affines": torch.tensor(affines, dtype=torch.float64).reshape(-1, count, 4),
                "images": torch.tensor(rows, dtype=torch.int64).reshape(-1, 3),
            }
            num_bytes = sum(tensor.nbytes for tensor in tensors.values())
            with report_write_errors(path, "writing features", num_bytes=num_bytes, then="run the command again"):
                write_tensors(path, tensors, {"key": key})

    tensors_of = {path: _map_shard(path)[0] for path in shards}
    stored = [row for part in tensors_of.values() for row in part["images"].tolist()]
    index = settings | {
        "num_features": num_features,
        "dim": dim,
        "shards": [
            {"name": path.name, "num_images": len(part["images"]), "bytes": path.stat().st_size}
            for path, part in tensors_of.items()
        ],
        "images": stored,  # id, width, height
        "affines": [row for part in tensors_of.values() for row in part["affines"].tolist()],
        "left_out": sorted({image.id for image in images} - {row[0] for row in stored}),
    }
    with report_write_errors(out, "writing features", then="run the command again"):
        write_atomically(out / _index_name(dataset.split), json.dumps(index) + "\n")
    return FeatureStore(out, dataset.split)


def _index_name(split: str) -> str:
    return f"features-{split}.json"


def _map_shard(path: Path) -> tuple[dict[str, Tensor], str]:
    """Return the tensors of a file, without reading them, and its key."""
    with safe_open(path, framework="pt") as file:
        names = ("features", "affines", "images")
        return {name: file.get_tensor(name) for name in names}, (file.metadata() or {}).get("key", "")


def _is_whole(path: Path, key: str) -> bool:
    """Return whether a file is complete. Raises `InputError` if it is, but with features of another kind."""
    try:
        found = _map_shard(path)[1]
    except (OSError, SafetensorError):
        return False
    if found != key:
        raise InputError(
            f"{path} holds features of another encoder, of other data or with other settings; name another folder, or "
            "remove it"
        )
    return True

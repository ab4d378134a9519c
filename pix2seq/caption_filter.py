"""Keep the captions of a data set that match their image, or add captions that a model writes: `data captions`.

These are the two halves of CapFilt, by which BLIP learns from noisy captions (arXiv 2201.12086). Each reads COCO
captions and writes a data set beside: a new file of captions and a report of what was dropped or added. Everything
else, images among it, is linked to the data set that was read, so other splits and tasks stay as they are.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from tqdm import tqdm

from pix2seq.data.formats.coco_files import find_files
from pix2seq.data.image_files import ImageFinder
from pix2seq.data.read_ahead import read_ahead
from pix2seq.errors import InputError
from pix2seq.files import check_new_folder, new_folder, output_folder, read_json, report_write_errors
from pix2seq.infer.outputs import as_json
from pix2seq.predictor import Predictor
from pix2seq.tasks.request import EncodedImage
from pix2seq.types import text_key

FILTER_REPORT, WRITE_REPORT = "filter-report.json", "write-report.json"
MIN_SCORE = 0.5  # of a caption that is kept
BATCH_SIZE = 16  # images that are encoded side by side

Entry = dict[str, Any]
"""An entry of a COCO file. Captions get the `score` by which they were kept, and `written` if a model wrote them."""


@dataclass(frozen=True)
class CaptionFile:
    """The captions of a split, in COCO's format."""

    root: Path
    name: PurePath  # of the file, below the root
    content: dict[str, Any]
    images: dict[int | str, Path]  # of the images that were found, by id
    captions: dict[int | str, list[Entry]]  # of these images, by their id
    unusable: dict[str, list[Entry]]  # captions that can be asked about nothing, by the reason

    @classmethod
    def read(cls, root: Path, split: str, *, annotations: Path | None = None, needed: bool = True) -> CaptionFile:
        """Read the captions of a split; with `needed` false, there may be none.

        Raises `InputError` if there are none, or if the file is no COCO file.
        """
        if not root.is_dir():
            raise InputError(f"data folder {root} does not exist; expected a folder in COCO layout")
        files = find_files(root, split, annotations)
        if files is None or (needed and "captions" not in files.files):
            raise InputError(
                f"{root} has no COCO captions of split {split!r}; expected annotations/captions_{split}*.json"
            )
        path = files.files.get("captions", files.first)
        content = read_json(path)
        if not isinstance(content, dict) or not isinstance(content.get("images"), list):
            raise InputError(f"{path} is no COCO file: it has no list of images; give a file of COCO captions")
        if "captions" not in files.files:
            content = {"images": content["images"], "annotations": []}
            path = path.with_name(f"captions_{files.split}.json")
        elif not isinstance(content.get("annotations"), list):
            raise InputError(f"{path} is no COCO file: it has no list of annotations; give a file of COCO captions")
        listed = {each["id"]: each["file_name"] for each in content["images"] if _is_image(each)}
        finder = ImageFinder(root, files.split, beside=files.first.parent if files.first.is_relative_to(root) else None)
        found = dict(zip(listed, finder.find(list(listed.values())), strict=True))
        images = {number: root / name for number, name in found.items() if name is not None}
        if not images:
            raise InputError(f"none of the {len(content['images'])} images listed in {path} was found under {root}")
        captions: dict[int | str, list[Entry]] = {number: [] for number in images}
        unusable: dict[str, list[Entry]] = {}
        for entry in content["annotations"]:
            text = entry.get("caption") if isinstance(entry, dict) else None
            number = entry.get("image_id") if isinstance(entry, dict) else None
            if not isinstance(text, str) or not text.strip():
                unusable.setdefault("no caption", []).append(entry)
            elif not isinstance(number, int | str) or number not in images:
                unusable.setdefault("no such image", []).append(entry)
            else:
                captions[number].append(entry)
        name = path.relative_to(root) if path.is_relative_to(root) else PurePath("annotations", path.name)
        return cls(root, name, content, images, captions, unusable)

    def write(self, out: Path, captions: Sequence[Entry], report: Mapping[str, Any], report_name: str) -> None:
        """Write a data set with these captions and a report, linked to this one for all else."""
        with new_folder(out) as folder, report_write_errors(out, "writing captions", then="run the command again"):
            _link(self.root.resolve(), folder, self.name.parts)
            content = json.dumps(self.content | {"annotations": list(captions)}) + "\n"
            (folder / self.name).write_text(content, encoding="utf-8")
            (folder / report_name).write_bytes(as_json(dict(report)))


def filter_captions(
    predictor: Predictor,
    captions: CaptionFile,
    out: Path,
    *,
    min_score: float = MIN_SCORE,
    best: int | None = None,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> dict[str, Any]:
    """Keep the captions of a score of at least `min_score`, and of these the `best` of each image; return the report.

    The score is the probability that the model gives to a caption being true of its image. Images stay, also without
    a caption; those that cannot be read lose theirs. The report has every caption that was dropped, and why.
    """
    _check_new(out)
    dropped = [_record(entry, captions, reason) for reason, some in captions.unusable.items() for entry in some]
    scores: dict[int, float] = {}  # by identity of the entry
    unreadable: dict[int | str, str] = {}
    with_captions = [number for number, entries in captions.captions.items() if entries]
    for number, image in _encoded(predictor, captions, with_captions, batch_size, progress=progress):
        entries = captions.captions[number]
        if isinstance(image, InputError):
            unreadable[number] = str(image)
            continue
        found = predictor.match(image, [entry["caption"] for entry in entries])
        scores |= {id(entry): float(score) for entry, score in zip(entries, found, strict=True)}
    kept: set[int] = set()
    for number, entries in captions.captions.items():
        ranked = sorted(entries, key=lambda entry: -scores.get(id(entry), 0.0))
        for rank, entry in enumerate(ranked):
            if number in unreadable:
                reason = unreadable[number]
            elif scores[id(entry)] < min_score:
                reason = f"its score is below {min_score:g}"
            elif best is not None and rank >= best:
                reason = f"{best} of this image are better" if best > 1 else "one of this image is better"
            else:
                kept.add(id(entry))
                continue
            dropped.append(_record(entry, captions, reason, scores.get(id(entry))))
    left = [
        entry | {"score": round(scores[id(entry)], 6)} for entry in captions.content["annotations"] if id(entry) in kept
    ]
    has_caption = {entry["image_id"] for entry in left}
    report = {
        "min_score": min_score,
        "best": best,
        "num_images": len(captions.images),
        "num_images_without_captions": len(captions.images) - len(has_caption),
        "kept": _by_source(left),
        "dropped": _by_source(dropped),
        "captions": dropped,
    }
    captions.write(out, left, report, FILTER_REPORT)
    return report


def write_captions(
    predictor: Predictor,
    captions: CaptionFile,
    out: Path,
    *,
    num_captions: int = 2,
    top_p: float = 0.9,
    seed: int = 0,
    batch_size: int = BATCH_SIZE,
    progress: bool = False,
) -> dict[str, Any]:
    """Add up to `num_captions` sampled captions to each image, and return a report of what was added.

    Tokens are sampled from `top_p` of the probability, by `seed`. A caption that the image has already, or that was cut
    at the longest length, is not added. A model that can match scores what it wrote.
    """
    _check_new(out)
    used = [entry.get("id") for entry in captions.content["annotations"] if isinstance(entry, dict)]
    next_id = max((number for number in used if isinstance(number, int)), default=0) + 1
    added: list[Entry] = []
    left_out: Counter[str] = Counter()
    for number, image in _encoded(predictor, captions, list(captions.images), batch_size, progress=progress):
        if isinstance(image, InputError):
            left_out["images that cannot be read"] += 1
            continue
        known = {_key(entry["caption"]) for entry in captions.captions[number]}
        texts: list[str] = []
        for sample in range(num_captions):
            caption = predictor.caption(image, seed=(seed + sample) % 2**64, top_p=top_p)
            if caption.truncated or not caption.text.strip():
                left_out["captions that were cut or empty"] += 1
            elif _key(caption.text) in known:
                left_out["captions that the image had"] += 1
            else:
                known.add(_key(caption.text))
                texts.append(caption.text)
        scores = predictor.match(image, texts).tolist() if texts and predictor.can_match else []
        for i, text in enumerate(texts):
            entry = {"id": next_id, "image_id": number, "caption": text, "written": True}
            added.append(entry | ({"score": round(scores[i], 6)} if len(scores) else {}))
            next_id += 1
    report = {
        "num_images": len(captions.images),
        "num_captions": num_captions,
        "top_p": top_p,
        "seed": seed,
        "added": _by_source(added),
        "left_out": dict(left_out),
        "captions": [_record(entry, captions) for entry in added],
    }
    captions.write(out, [*captions.content["annotations"], *added], report, WRITE_REPORT)
    return report


def _encoded(
    predictor: Predictor, captions: CaptionFile, numbers: Sequence[int | str], batch_size: int, *, progress: bool
) -> Iterator[tuple[int | str, EncodedImage | InputError]]:
    """Yield images by their ids, encoded in batches, or why one cannot be read."""
    with tqdm(total=len(numbers), unit="image", disable=not progress) as bar:
        for some in read_ahead([captions.images[number] for number in numbers], batch_size):
            readable = {i: pixels for i, pixels in some if not isinstance(pixels, InputError)}
            encoded = dict(zip(readable, predictor.encode_batch(list(readable.values())), strict=True))
            for i, pixels in some:
                yield numbers[i], pixels if isinstance(pixels, InputError) else encoded[i]
            bar.update(len(some))


def _record(entry: Any, captions: CaptionFile, reason: str | None = None, score: float | None = None) -> Entry:
    """Return a caption as the report names it."""
    fields = entry if isinstance(entry, dict) else {}
    number = fields.get("image_id")
    path = captions.images.get(number) if isinstance(number, int | str) else None
    record = {name: fields.get(name) for name in ("id", "image_id", "caption", "score")}
    record |= {"written": fields.get("written") is True}
    record |= {"file_name": None if path is None else path.relative_to(captions.root).as_posix()}
    record |= {} if score is None else {"score": round(score, 6)}
    return record if reason is None else record | {"reason": reason}


def _by_source(entries: Sequence[Entry]) -> dict[str, int]:
    written = sum(entry.get("written") is True for entry in entries)
    return {"given": len(entries) - written, "written": written}


def _key(text: str) -> str:
    """Return the key by which two captions are the same: case, spaces and the full stop aside."""
    return " ".join(text_key(text).split()).removesuffix(".").rstrip()


def _is_image(entry: Any) -> bool:
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), int | str)
        and isinstance(entry.get("file_name"), str)
        and bool(entry["file_name"])
    )


def _check_new(out: Path) -> None:
    """Raise `InputError` unless a folder can be written and is new or empty, before the model is asked anything."""
    check_new_folder(out)
    output_folder(out.parent)


def _link(root: Path, folder: Path, replaced: Sequence[str]) -> None:
    """Fill a folder with links to all that is in `root`, but for a file, named in parts, that will be written there."""
    head, *rest = replaced
    for name in sorted(os.listdir(root)) if root.is_dir() else ():
        if name not in (head, FILTER_REPORT, WRITE_REPORT) and name[0] != ".":
            (folder / name).symlink_to(root / name)
    if rest:
        (folder / head).mkdir()
        _link(root / head, folder / head, rest)

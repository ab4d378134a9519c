"""Search a folder of images: embed each image once, then find those that a sentence or another image is like.

`pix2seq index` and `pix2seq search`. The contrast compares a sentence with all images at once, and what is left is put
in order by matching, which reads each image together with the sentence.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pix2seq.data.image import read_image
from pix2seq.data.image_index import INDEX_FILE, SHARD_IMAGES, ImageIndex, Stamp
from pix2seq.data.read_ahead import read_ahead
from pix2seq.drawing import Canvas, tile
from pix2seq.errors import InputError
from pix2seq.files import output_folder, read_json, report_write_errors, write_atomically
from pix2seq.infer.inputs import find_inputs, is_video
from pix2seq.infer.outputs import as_json
from pix2seq.predictor import ImageLike, Predictor

NUM_CANDIDATES = 100  # images that the contrast finds for matching to order
NUM_SHOWN = 20
BATCH_SIZE = 16  # images that are encoded side by side
RESULTS_FILE, SHEET_FILE = "results.json", "results.png"
_COLUMNS = 4  # of a contact sheet
_SIDE = 512  # pixels, of the longer side of its images


@dataclass(frozen=True)
class Update:
    """What became of the images of a folder."""

    num_images: int  # in the index
    num_new: int
    num_changed: int
    num_removed: int
    unreadable: Mapping[str, InputError]  # by name

    def text(self) -> str:
        """Return the numbers in one line."""
        return (
            f"{self.num_images} images: {self.num_new} new, {self.num_changed} changed, {self.num_removed} removed, "
            f"{len(self.unreadable)} unreadable"
        )


@dataclass(frozen=True)
class Hit:
    """An image that a search found."""

    name: str  # path below the folder that was indexed
    score: float  # cosine of the embeddings of the question and the image
    match: float | None = None  # probability that the sentence is true of the image; None: matching was not asked

    def to_json(self) -> dict[str, Any]:
        """Return plain values."""
        return {"file": self.name, "score": round(self.score, 6)} | (
            {} if self.match is None else {"match": round(self.match, 6)}
        )

    def text(self) -> str:
        """Return the scores in a few words."""
        return f"{self.score:.3f}" + ("" if self.match is None else f", match {self.match:.3f}")


def open_index(out: Path, folder: Path, *, checkpoint: Path, model: str) -> ImageIndex:
    """Open the index of a folder of images to extend it, or begin one.

    `model` is the fingerprint of the checkpoint. Raises `InputError` if `folder` is none, or if `out` holds the index
    of another model or of another folder that still exists.
    """
    if not folder.is_dir():
        reason = "is a file" if folder.exists() else "does not exist"
        raise InputError(f"{folder} {reason}; expected a folder of images")
    root = folder.resolve()
    if not (out / INDEX_FILE).exists():
        return ImageIndex.create(out, root=root, checkpoint=checkpoint, model=model)
    index = ImageIndex(out)
    if not len(index):
        return ImageIndex.create(out, root=root, checkpoint=checkpoint, model=model)
    index.check_model(model)
    if index.root == root:
        return index
    if index.root.is_dir():
        raise InputError(f"{out} is the index of {index.root}, not of {root}; give another --out")
    return ImageIndex.create(out, root=root, checkpoint=checkpoint, model=model)  # the folder was moved


def update_index(
    predictor: Predictor, index: ImageIndex, *, batch_size: int = BATCH_SIZE, progress: bool = False
) -> Update:
    """Bring an index up to date with its folder: embed what is new or has changed, and drop what is gone.

    Images that cannot be read are left out. A call that was killed is made up for by the next one, which embeds again
    at most `SHARD_IMAGES` images. Raises `InputError` if the folder holds no images.
    """
    paths = [path for path in find_inputs([index.root]) if not is_video(path)]
    now = {stamp.name: stamp for path in paths if (stamp := _stamp(path, index.root)) is not None}
    before = dict(index.stamps)
    todo = [stamp for stamp in now.values() if before.get(stamp.name) != stamp]
    unreadable: dict[str, InputError] = {}
    done: list[Stamp] = []
    vectors: list[NDArray[np.float32]] = []
    with tqdm(total=len(todo), unit="image", disable=not progress) as bar:
        for some in read_ahead([index.root / stamp.name for stamp in todo], batch_size):
            readable = [(todo[i], pixels) for i, pixels in some if not isinstance(pixels, InputError)]
            unreadable |= {todo[i].name: error for i, error in some if isinstance(error, InputError)}
            if readable:
                done += [stamp for stamp, _ in readable]
                vectors.append(predictor.embed([pixels for _, pixels in readable]))
            bar.update(len(some))
            if len(done) > SHARD_IMAGES - batch_size:
                index.add(done, np.concatenate(vectors))
                done, vectors = [], []
    if done:
        index.add(done, np.concatenate(vectors))
    index.keep(now.keys() - unreadable.keys())
    changed = {stamp.name for stamp in todo} & before.keys() - unreadable.keys()
    return Update(
        num_images=len(index),
        num_new=len(todo) - len(unreadable) - len(changed),
        num_changed=len(changed),
        num_removed=len(before.keys() - index.stamps.keys()),
        unreadable=unreadable,
    )


def search(
    predictor: Predictor,
    index: ImageIndex,
    *,
    sentence: str | None = None,
    image: ImageLike | None = None,
    top: int = NUM_SHOWN,
    num_candidates: int = NUM_CANDIDATES,
    match: bool = True,
) -> list[Hit]:
    """Return the images of an index that a sentence is true of, or that another image is like, best first.

    With `match`, a predictor that can match orders the `num_candidates` best by the probability that the sentence is
    true of them. Candidates that cannot be read any more are named in a warning and left out. Raises `InputError`
    unless there is either a sentence or an image.
    """
    if (sentence is None) == (image is None) or (sentence is not None and not sentence.strip()):
        raise InputError("a search needs either a sentence or an image; give one of them")
    if sentence is None:
        assert image is not None
        query = predictor.embed([image])[0]
        return [Hit(name, score) for name, score in index.nearest(query, top)]
    matches = match and predictor.can_match
    query = predictor.embed_text([sentence])[0]
    hits = [Hit(name, score) for name, score in index.nearest(query, max(top, num_candidates) if matches else top)]
    if not matches:
        return hits
    matched: list[Hit] = []
    for some in read_ahead([index.root / hit.name for hit in hits], BATCH_SIZE):
        for error in (each for _, each in some if isinstance(each, InputError)):
            print(f"warning: left out: {error}", file=sys.stderr)
        readable = {i: pixels for i, pixels in some if not isinstance(pixels, InputError)}
        for i, each in zip(readable, predictor.encode_batch(list(readable.values())), strict=True):
            probability = float(predictor.match(each, [sentence])[0])
            matched.append(replace(hits[i], match=probability))
    return sorted(matched, key=lambda hit: -(hit.match or 0.0))[:top]


def check_results(out: Path, *, overwrite: bool) -> None:
    """Create the folder of the results. Raises `InputError` if it holds files of these names that no search wrote."""
    output_folder(out)
    path = out / RESULTS_FILE
    found = [each for each in (path, out / SHEET_FILE) if each.exists()]
    try:
        is_ours = path.is_file() and read_json(path).keys() == {"query", "folder", "num_images", "results"}
    except (InputError, AttributeError):
        is_ours = False
    if found and not is_ours and not overwrite:
        raise InputError(
            f"{found[0]} exists and no search wrote it; give another folder with --out, or replace it by --overwrite"
        )


def write_results(out: Path, query: Mapping[str, str], index: ImageIndex, hits: Sequence[Hit]) -> None:
    """Write results.json and results.png, a contact sheet. Images that cannot be read any more are not drawn."""
    content = {
        "query": dict(query),
        "folder": str(index.root),
        "num_images": len(index),
        "results": [hit.to_json() for hit in hits],
    }
    drawn = []
    for number, hit in enumerate(hits, start=1):
        try:
            canvas = Canvas(thumbnail(index.root / hit.name, _SIDE))
        except InputError as error:
            print(f"warning: not drawn: {error}", file=sys.stderr)
            continue
        canvas.text(f"{number}. {hit.text()}")
        canvas.text(hit.name)
        drawn.append(canvas.finish())
    with report_write_errors(out, "writing results", then="search again"):
        if drawn:
            tile(drawn, columns=min(_COLUMNS, len(drawn))).save(out / SHEET_FILE)
        else:
            (out / SHEET_FILE).unlink(missing_ok=True)
        write_atomically(out / RESULTS_FILE, as_json(content))


def thumbnail(path: Path, side: int, **options: Any) -> NDArray[np.uint8]:
    """Return the pixels of an image with a longer side of at most `side`; for `options`, see `read_image`."""
    image = Image.fromarray(read_image(path, **options))
    image.thumbnail((side, side))
    return np.asarray(image)


def _stamp(path: Path, root: Path) -> Stamp | None:
    """Return the stamp of a file, None if it was removed since it was listed."""
    try:
        status = path.stat()
    except OSError:
        return None
    return Stamp(path.relative_to(root).as_posix(), status.st_size, status.st_mtime_ns)

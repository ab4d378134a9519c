"""Ask about images: `python infer/predict.py IMAGE... --checkpoint DIR --task ...`, or `pix2seq predict`.

Writes NAME.json and NAME.png for every image, NAME.json and NAME.mp4 for every video, and with --format what labelling
tools import.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from pix2seq.data.formats.predictions import FORMATS, LabelledImage, yolo_label_file
from pix2seq.data.image import MAX_PIXELS, batch_by_pixels, image_size, read_image
from pix2seq.device import pick_device
from pix2seq.errors import InputError
from pix2seq.files import output_folder, read_json
from pix2seq.infer.inputs import find_inputs, is_video
from pix2seq.infer.outputs import SUFFIXES, VIDEO_SUFFIXES, Outputs, as_json, output_names
from pix2seq.infer.video import Frame, VideoReader, VideoWriter
from pix2seq.model.hub import local_folder
from pix2seq.model.pix2seq import Pix2Seq
from pix2seq.model.pretrained import CONFIG_FILE, WEIGHTS_FILE, find_checkpoint
from pix2seq.predictor import Prediction, Predictor
from pix2seq.tasks.objects import Boxes
from pix2seq.tasks.request import EncodedImage

MAX_REASONS = 10  # why images failed; further ones are only named

T = TypeVar("T")


def predict_files(
    images: Sequence[Path],
    *,
    checkpoint: Path,
    out: Path,
    tasks: Sequence[str] | None = None,
    boxes: Path | None = None,
    about: str | None = None,
    find: Sequence[str] = (),
    like: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    min_score: float | None = None,
    batch_size: int = 16,
    seed: int = 0,
    device: str = "auto",
    bf16: bool = False,
    resume: bool = False,
    overwrite: bool = False,
    stride: int = 1,
    label_format: str | None = None,
) -> None:
    """Run `tasks`, by default all that the checkpoint knows, on images; write NAME.json and NAME.png into `out`.

    `images` are files, folders and patterns, see `find_inputs`. Of videos, every `stride`-th frame is asked about, and
    NAME.mp4 takes the place of NAME.png. `label_format` is one of `FORMATS`: files for a labelling tool, with the
    objects of at least `min_score`.

    Images of one name get the folders in which they differ in front: a/x.jpg and b/x.jpg give a/x.json and b/x.json.
    No output replaces an input, nor, without `overwrite`, a file that this did not write or that was changed since.
    With `resume`, images are left out that have outputs of the same image, question and checkpoint.

    An image that cannot be read or asked about stops nothing: the others are done first, then an `InputError` names
    it. Tasks about objects take them from detection, or from `boxes`: a file as this writes it, or a folder of such
    files. `about` is text for the tasks that take some, see `Task.parse_about`. `find` are phrases for those that find
    objects by words, `like` examples, in the form of `about`, for those that find objects by them; without `tasks`,
    only such tasks are asked then. `settings` are those of `Predictor.configure`.
    `min_score` applies to drawings and `label_format`, where by default `Predictor.thresholds` do, and is the least
    score of what tasks find by words or examples, by default that of the checkpoint.
    """
    if not images:
        raise InputError("no image was given; name one or more image files")
    if batch_size < 1:
        raise InputError(f"batch_size is {batch_size}; expected at least 1")
    names = output_names(find_inputs(images))
    videos = [path for path in names if is_video(path)]
    if videos and (boxes is not None or label_format is not None):
        what = "--boxes" if boxes is not None else "--format"
        raise InputError(f"{what} is for images, but {videos[0]} is a video; ask about videos apart from that")
    label_names = _label_names([path for path in names if not is_video(path)]) if label_format is not None else {}
    box_files: dict[Path, Path] = {}
    if boxes is not None:
        box_files = {path: boxes / f"{name}.json" if os.path.isdir(boxes) else boxes for path, name in names.items()}
    folder = find_checkpoint(local_folder(checkpoint))
    outputs = Outputs(output_folder(out))
    planned: dict[str, tuple[str, ...]] = {
        name: VIDEO_SUFFIXES if is_video(path) else SUFFIXES for path, name in names.items()
    }
    planned |= _planned_labels(label_format, label_names, names)
    like_files = [Path(each.rpartition(":")[0]) for each in like]
    outputs.check(planned, [*names, *box_files.values(), *like_files, *folder.iterdir()], overwrite=overwrite)

    predictor = Predictor(Pix2Seq.from_pretrained(folder).to(pick_device(device)), bf16=bf16)  # the folder is verified
    told = {name: "; ".join(find) for name, task in predictor.tasks.items() if find and task.takes_words}
    told |= {name: "; ".join(like) for name, task in predictor.tasks.items() if like and task.takes_examples}
    if tasks is None:
        alone = (name for name, task in predictor.tasks.items() if about is not None or not task.needs_about)
        tasks = tuple(told or alone)
    if not tasks:
        raise InputError(f"{', '.join(predictor.tasks)} must be told what to look for; give --about, --find or --like")
    told = {name: text for name, text in told.items() if name in tasks}
    if find and not any(predictor.tasks[name].takes_words for name in told):
        raise _no_finder("--find", "words")
    if like and not any(predictor.tasks[name].takes_examples for name in told):
        raise _no_finder("--like", "examples")
    for name in tasks:
        predictor.require(name)
    predictor.configure(**(settings or {}))
    if min_score is not None:
        finders = [name for name in tasks if predictor.tasks[name].takes_words or predictor.tasks[name].takes_examples]
        predictor.configure(finders, min_score=min_score)
    asked = {name: predictor.tasks[name] for name in tasks}
    given = {} if about is None else {name: about for name, task in asked.items() if task.about_format}
    if about is not None and not given:
        raise InputError(f"--about was given, but none of {', '.join(tasks)} takes it; they ask about whole images")
    texts = {name: asked[name].parse_about(text) for name, text in (given | told).items()}
    texts = {name: asked[name].encoded([each], predictor.encode_batch)[0] for name, each in texts.items()}
    with_boxes = [name for name, task in asked.items() if boxes is not None and task.needs]
    if boxes is not None and not with_boxes:
        raise InputError(f"--boxes was given, but none of {', '.join(tasks)} asks about objects")

    run: list[Any] = [list(tasks), about, list(find), list(like), dict(settings or {}), min_score, seed, bf16]
    run += [_stamp(folder / name) for name in (CONFIG_FILE, WEIGHTS_FILE)]
    run += map(_stamp, like_files)
    more = {path: [stride] if is_video(path) else [] for path in names}
    keys = {path: _digest([*run, _stamp(path), _stamp(box_files.get(path)), *more[path]]) for path in names}
    left = [path for path, name in names.items() if not (resume and outputs.is_done(name, keys[path]))]
    todo = [path for path in left if not is_video(path)]
    if resume:
        print(f"{len(names) - len(left)} of {len(names)} files are done already", file=sys.stderr)

    def question(path: Path, image: EncodedImage) -> dict[str, Any]:
        """Return what an image is asked about, by task. Raises `InputError` if it cannot be asked so."""
        questions = dict(texts)
        if path in box_files:
            questions |= dict.fromkeys(with_boxes, read_boxes(box_files[path]))
        for name, value in questions.items():
            asked[name].requests(image, asked[name].check_about(image, value))
        return questions

    failed: dict[Path, InputError] = {}
    with tqdm(total=len(todo), unit="image", disable=len(todo) <= batch_size) as bar:
        for start in range(0, len(todo), batch_size):
            sizes = _each(image_size, failed, todo[start : start + batch_size])
            for part in batch_by_pixels(list(sizes.values()), batch_size):
                pixels = _each(read_image, failed, list(sizes)[part.start : part.stop])
                encoded = dict(zip(pixels, predictor.encode_batch(list(pixels.values())), strict=True))
                questions = _each(question, failed, encoded, encoded.values())
                predictions = predictor.predict_batch(
                    [encoded[path] for path in questions],
                    tasks,
                    {name: [given[name] for given in questions.values()] for name in (*texts, *with_boxes)},
                    seed=seed,
                )
                for path, prediction in zip(questions, predictions, strict=True):
                    content = {"image": path.name} | prediction.to_json()
                    outputs.write(names[path], keys[path], content, prediction.draw(min_score=min_score))
            bar.update(min(batch_size, len(todo) - start))

    def ask_about(frames: Sequence[Frame]) -> list[Prediction]:
        return predictor.predict_batch(
            [frame.pixels for frame in frames], tasks, {name: [texts[name]] * len(frames) for name in texts}, seed=seed
        )

    for path in (path for path in left if is_video(path)):
        try:
            reader = VideoReader(path, stride=stride)
            _predict_video(reader, ask_about, outputs, names[path], keys[path], batch_size, min_score)
        except InputError as error:
            failed[path] = error
    if label_format is not None:
        categories = predictor.model.categories or tuple(next(iter(predictor.tasks.values())).categories.values())
        shown = min(predictor.thresholds[name] for name in tasks) if min_score is None else min_score
        labelled = [
            _labelled(out / f"{names[path]}.json", label_names[path], shown)
            for path in label_names
            if path not in failed
        ]
        for name, text in FORMATS[label_format](labelled, categories).items():
            outputs.write_files(name, "", {"": text.encode()})
    if failed:
        raise _failure(failed, len(names), out)


def _no_finder(option: str, means: str) -> InputError:
    return InputError(f"{option} was given, but this checkpoint, or --task, has no task that finds objects by {means}")


def _predict_video(
    reader: VideoReader,
    ask_about: Callable[[Sequence[Frame]], list[Prediction]],
    outputs: Outputs,
    name: str,
    key: str,
    batch_size: int,
    min_score: float | None,
) -> None:
    """Write NAME.mp4 and NAME.json of a video. Raises `InputError` if its frames cannot be read or asked about."""
    partial = outputs.partial(name, VIDEO_SUFFIXES[0])
    writer = VideoWriter(partial, reader.fps / reader.stride)
    answers: list[dict[str, Any]] = []
    size: dict[str, int] = {}
    try:
        with tqdm(total=reader.num_listed or None, unit="frame", desc=reader.path.name) as bar:
            for frames in _batches(iter(reader), batch_size):
                for frame, prediction in zip(frames, ask_about(frames), strict=True):
                    content = prediction.to_json()
                    size = {side: content.pop(side) for side in ("width", "height")}
                    answers.append({"frame": frame.number, "seconds": round(frame.number / reader.fps, 3)} | content)
                    writer.add(prediction.draw(min_score=min_score))
                bar.update(reader.num_read - bar.n)
        writer.close()
        facts = {"fps": reader.fps, "num_frames": reader.num_read, "stride": reader.stride}
        json_bytes = as_json({"video": reader.path.name} | size | facts | {"frames": answers})
        outputs.write_files(name, key, dict(zip(VIDEO_SUFFIXES, (partial, json_bytes), strict=True)))
    finally:
        partial.unlink(missing_ok=True)
    if reader.num_read < reader.num_listed:
        print(
            f"warning: {reader.path} says that it has {reader.num_listed} frames, but {reader.num_read} could be read",
            file=sys.stderr,
        )


def _batches(frames: Iterator[Frame], batch_size: int) -> Iterator[list[Frame]]:
    """Yield frames side by side, as many as memory allows."""
    for first in frames:
        height, width = first.pixels.shape[:2]
        yield [first, *islice(frames, min(batch_size, max(MAX_PIXELS // (height * width), 1)) - 1)]


def _label_names(images: Sequence[Path]) -> dict[Path, str]:
    """Return the path of each image below the folder that all of them lie in."""
    absolute = {path: os.path.abspath(path) for path in images}
    above = os.path.commonpath([os.path.dirname(path) for path in absolute.values()]) if absolute else ""
    return {path: Path(os.path.relpath(name, above)).as_posix() for path, name in absolute.items()}


def _planned_labels(
    label_format: str | None, label_names: Mapping[Path, str], names: Mapping[Path, str]
) -> dict[str, tuple[str, ...]]:
    """Return the files that a format will write, as `Outputs.check` takes them."""
    if label_format is None:
        return {}
    planned: dict[str, tuple[str, ...]] = dict.fromkeys(FORMATS[label_format]([], []), ("",))
    taken = {f"{name}{suffix}".casefold(): path for path, name in names.items() for suffix in SUFFIXES}
    for file in planned:
        if file in taken:
            raise InputError(f"{taken[file]} and --format {label_format} would both write {file}; rename the image")
    if label_format == "yolo":
        labels: dict[str, Path] = {}
        for path, name in label_names.items():
            other = labels.setdefault(yolo_label_file(name).casefold(), path)
            if other != path:
                raise InputError(f"{other} and {path} would have the same labels in YOLO; rename one of them")
        planned |= {yolo_label_file(name): ("",) for name in label_names.values()}
    return planned


def _labelled(path: Path, name: str, min_score: float) -> LabelledImage:
    """Read a NAME.json back, of which objects of at least `min_score` count."""
    content = read_json(path)
    instances = [found for found in content["instances"] if found["score"] >= min_score]
    captions = [caption["text"] for caption in content["captions"]]
    return LabelledImage(name, content["width"], content["height"], instances, captions)


def read_boxes(path: Path) -> Boxes:
    """Read objects from a NAME.json. Raises `InputError` if it holds none in that form."""
    try:
        entries = read_json(path)["instances"]
        sides = [[float(value) for value in entry["bbox"]] for entry in entries]
        corners = [(x, y, x + width, y + height) for x, y, width, height in sides]
        names = [str(entry["category"]) for entry in entries]
        return Boxes(corners, names, [float(entry.get("raw_score", entry.get("score", 1.0))) for entry in entries])
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; give a NAME.json for each image, as predict writes it") from None
    except InputError:
        raise
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError) as error:
        raise InputError(
            f"{path} is no file of boxes ({type(error).__name__}: {error}); expected "
            '{"instances": [{"bbox": [x, y, width, height], "category": NAME, "score": 0 to 1}]}'
        ) from None


def _each(
    function: Callable[..., T], failed: dict[Path, InputError], paths: Iterable[Path], *more: Iterable[Any]
) -> dict[Path, T]:
    """Apply a function to images, and to `more` values of each; put those that it refuses into `failed`."""
    found = {}
    for path, *values in zip(paths, *more, strict=True):
        try:
            found[path] = function(path, *values)
        except InputError as error:
            failed[path] = error
    return found


def _failure(failed: Mapping[Path, InputError], num_images: int, out: Path) -> InputError:
    """Return an error that names every image that failed, the first ones with their reasons."""
    reasons = list(map(str, failed.values()))[:MAX_REASONS]
    if others := list(map(str, failed))[MAX_REASONS:]:
        reasons.append(f"{', '.join(others)} too")
    if len(failed) < num_images:
        reasons.append(f"the other {num_images - len(failed)} of {num_images} images are done, in {out}")
    return InputError("; ".join(reasons))


def _stamp(path: Path | None) -> list[int] | None:
    """Return the size and modification time of a file, by which a change of it shows; None if there is no file."""
    try:
        status = None if path is None else path.stat()
    except (OSError, ValueError):
        status = None
    return None if status is None else [status.st_size, status.st_mtime_ns]


def _digest(values: list[Any]) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


if __name__ == "__main__":
    from pix2seq.cli import main

    sys.exit(main(["predict", *sys.argv[1:]]))

"""Speed of preparing training samples, by stage, and the cost of large data sets.

    python benchmarks/data.py [--turns 5] [--large] [--json]

Writes 640x480 images with COCO annotations to a temporary folder: per image seven objects with polygons of 30
points, two of them persons with 17 keypoints, and five captions. `samples`: images/s of one process, from file to a
collated batch of 640 px training samples, by task, and the share of each stage: decode, affine (resampling),
photometry (brightness, contrast and saturation), sequences (annotations, their transform, and the task's tokens) and
collate. Pillow and simplejpeg (`pip install pix2seq[turbo]`) decode to the same pixels and take turns. Times are CPU
times, medians over turns.

`--large` adds, each size in its own process:

- `growth`: data sets of up to 2 million images and 30 million boxes (15 per image) in flat arrays, which name the
  same few files. Memory of the arrays, growth of the resident size, seconds until a `TrainingSet` is ready,
  microseconds for the annotations of a random image, and images/s. Two workers: each one's own memory (USS), and
  with its part of shared memory (PSS).
- `reading`: the reader on a COCO file with 200,000 images and 3 million boxes: seconds, file size, peak resident
  size.

Results go to benchmarks/results/, dated; --json prints them as one JSON object and nothing else.
"""

from __future__ import annotations

import argparse
import gc
import json
import multiprocessing
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import cv2
import numpy as np
from PIL import Image

import pix2seq.data.image as image_module
import pix2seq.data.samples as training_set_module
import pix2seq.data.transforms as transforms_module
from pix2seq.cli import run_guarded
from pix2seq.data.annotations import ImageTable, box_annotations
from pix2seq.data.defects import defect_frame
from pix2seq.data.formats.builder import Dataset
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.loader import batches
from pix2seq.data.sampler import EpochSampler
from pix2seq.data.samples import TrainingSet
from pix2seq.data.transforms import AugmentConfig
from pix2seq.examples import collate
from pix2seq.tasks import BUILT_IN, get_task
from pix2seq.tasks.captioning import Captioning, CaptioningConfig
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.types import Category
from pix2seq.vocab import Vocab

WIDTH, HEIGHT, SIZE = 640, 480, (640, 640)
OBJECTS, POINTS, KEYPOINTS, CAPTIONS = 7, 30, 17, 5  # per image; close to COCO's means
BOXES = 15  # per image of the large data sets
AUGMENT = AugmentConfig(brightness=0.4, contrast=0.4, saturation=0.4)
STAGES = ("decode", "affine", "photometry", "sequences", "collate")
GROWTH = (20_000, 200_000, 2_000_000)  # images
READING = 200_000  # images
MIB = 2**20


def write_images(root: Path, count: int) -> int:
    """Write JPEG images with edges, texture and grain, and COCO annotations; return the mean bytes per image."""
    rng = np.random.default_rng(0)
    (root / "annotations").mkdir(parents=True)
    (root / "train").mkdir()
    images, objects, people, captions = [], [], [], []
    total = 0
    for number in range(count):
        coarse = rng.integers(0, 256, (12, 16, 3), np.uint8)
        pixels = cv2.resize(coarse, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC).astype(np.int16)
        image = {"id": number, "file_name": f"{number:06d}.jpg", "width": WIDTH, "height": HEIGHT}
        images.append(image)
        for position in range(OBJECTS):
            w, h = rng.integers(40, 300, 2).tolist()
            x, y = int(rng.integers(0, WIDTH - w)), int(rng.integers(0, HEIGHT - h))
            pixels[y : y + h, x : x + w] += rng.integers(-60, 61, 3)
            angles = np.linspace(0, 2 * np.pi, POINTS, endpoint=False)
            ring = np.stack([x + w / 2 * (1 + np.cos(angles)), y + h / 2 * (1 + np.sin(angles))], axis=1)
            entry = {
                "id": number * OBJECTS + position + 1,
                "image_id": number,
                "category_id": 1 if position < 2 else 2,
                "bbox": [x, y, w, h],
                "area": w * h * 0.785,
                "iscrowd": 0,
                "segmentation": [ring.round(2).ravel().tolist()],
            }
            objects.append(entry)
            if position < 2:
                points = np.column_stack([rng.random((KEYPOINTS, 2)) * [w, h] + [x, y], np.full(KEYPOINTS, 2)])
                people.append(entry | {"keypoints": points.round().ravel().tolist()})
        captions += [
            {"id": number * CAPTIONS + i, "image_id": number, "caption": f"a person beside thing {i} in a wide room"}
            for i in range(CAPTIONS)
        ]
        pixels += rng.integers(-9, 10, pixels.shape, np.int16)
        path = root / "train" / str(image["file_name"])
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        total += path.stat().st_size
    person = {"id": 1, "name": "person", "keypoints": [f"k{i}" for i in range(KEYPOINTS)], "flip_pairs": []}
    categories = [person, {"id": 2, "name": "thing"}]
    for kind, entries in (("instances", objects), ("person_keypoints", people), ("captions", captions)):
        content = {"images": images, "annotations": entries, "categories": categories}
        (root / "annotations" / f"{kind}_train.json").write_text(json.dumps(content))
    return total // count


@contextmanager
def timed(task: Any, seconds: dict[str, float]) -> Iterator[None]:
    """The stages of a sample, as `TrainingSet` calls them, with their processor time added up."""
    places: list[tuple[Any, str, str]] = [
        (training_set_module, "read_record_image", "decode"),
        (transforms_module, "visible_part", "affine"),
        (transforms_module, "pad_image", "affine"),
        (transforms_module, "color_jitter", "photometry"),
        (training_set_module, "transform_target", "sequences"),
        (Dataset, "target", "sequences"),
        (type(task), "examples", "sequences"),
    ]

    def wrapped(function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            started = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[stage] += time.process_time() - started

        return call

    before = [getattr(owner, name) for owner, name, _ in places]
    for (owner, name, stage), function in zip(places, before, strict=True):
        setattr(owner, name, wrapped(function, stage))
    try:
        yield
    finally:
        for (owner, name, _), function in zip(places, before, strict=True):
            setattr(owner, name, function)


def one_turn(samples: TrainingSet, count: int, batch_size: int) -> dict[str, float]:
    """Return seconds of CPU time for `count` images, in all and by stage."""
    seconds: dict[str, float] = defaultdict(float)
    keys = islice(EpochSampler(len(samples), batch_size, seed=0), count // batch_size)
    started = time.process_time()
    with timed(samples.task, seconds):
        for some in keys:
            read = [samples[key] for key in some]
            before = time.process_time()
            collate(read, samples.tasks)
            seconds["collate"] += time.process_time() - before
    return {"all": time.process_time() - started, **{stage: seconds[stage] for stage in STAGES}}


def measure_samples(root: Path, args: argparse.Namespace) -> list[dict[str, Any]]:
    dataset = read_coco(root, "train")
    text = Captioning.make_text_tokenizer(CaptioningConfig(), list(dataset.annotations.all_captions()))
    vocab = Vocab().with_text(text.size)
    turbo = image_module._turbo()
    decoders = {"pillow": None} | ({"simplejpeg": turbo} if turbo is not None else {})
    rows = []
    for name, kind in ((name, get_task(name)) for name in BUILT_IN):
        task = kind(kind.config_type(), vocab, dataset.categories, text)
        samples = TrainingSet(dataset, task, size=SIZE, augment=AUGMENT, seed=0)
        turns: dict[str, list[dict[str, float]]] = {who: [] for who in decoders}
        for turn in range(args.turns + 1):
            for who, decode in decoders.items():
                image_module._turbo = lambda decode=decode: decode  # type: ignore[assignment,misc]
                times = one_turn(samples, args.images, args.batch_size)
                if turn:  # the first turn warms up
                    turns[who].append(times)
        for who, measured in turns.items():
            seconds = median(times["all"] for times in measured)
            row: dict[str, Any] = {"task": name, "decoder": who, "images_per_second": args.images / seconds}
            row["ms_per_image"] = 1000 * seconds / args.images
            row["share"] = {stage: median(t[stage] / t["all"] for t in measured) for stage in STAGES}
            row["times_pillow"] = median(a["all"] / b["all"] for a, b in zip(turns["pillow"], measured, strict=True))
            rows.append(row)
    return rows


def large_dataset(root: Path, num_images: int) -> Dataset:
    """Make a data set with boxes only, and the same few image files over and over."""
    names = sorted(f"train/{path.name}" for path in (root / "train").iterdir())
    images = ImageTable.build(root, ((i, names[i % len(names)], WIDTH, HEIGHT) for i in range(num_images)))
    rng = np.random.default_rng(0)
    count = num_images * BOXES
    boxes = np.empty((count, 4), np.float32)
    for start in range(0, count, MIB):
        corner = rng.random((min(MIB, count - start), 2), np.float32) * [WIDTH / 2, HEIGHT / 2]
        sides = rng.random(corner.shape, np.float32) * [WIDTH / 2 - 2, HEIGHT / 2 - 2] + 1
        boxes[start : start + len(corner)] = np.concatenate([corner, corner + sides], axis=1)
    annotations = box_annotations(
        first=np.arange(0, count + 1, BOXES),
        boxes_xyxy=boxes,
        labels=rng.integers(1, 3, count, np.int32),
        areas=(boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1]),
        iscrowd=np.zeros(count, np.bool_),
        ids=np.arange(count),
    )
    categories = (Category(1, 1, "person"), Category(2, 2, "thing"))
    return Dataset(root, "train", categories, images, defect_frame([]), annotations)


def memory(pid: int | str = "self") -> dict[str, float] | None:
    """Return MiB of a process: resident, own (USS), and with its part of shared memory (PSS); Linux only."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
    except OSError:
        return None
    kib = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return {
        "rss": kib["Rss"] / 1024,
        "pss": kib["Pss"] / 1024,
        "uss": (kib["Private_Clean"] + kib["Private_Dirty"]) / 1024,
    }


def measure_growth(root: Path, num_images: int) -> dict[str, Any]:
    before = memory()
    dataset = large_dataset(root, num_images)
    gc.collect()
    after = memory()
    images = dataset.images
    arrays = dataset.annotations.num_bytes + sum(
        array.nbytes for array in (images.ids, images.widths, images.heights, images.first_byte, images.names)
    )
    row: dict[str, Any] = {
        "images": num_images,
        "boxes": len(dataset.annotations),
        "arrays_mib": arrays / MIB,
        "bytes_per_box": dataset.annotations.num_bytes / len(dataset.annotations),
        "rss_growth_mib": None if before is None or after is None else after["rss"] - before["rss"],
    }
    started = time.process_time()
    task = Detection(DetectionConfig(), Vocab(), dataset.categories)
    samples = TrainingSet(dataset, task, size=SIZE, augment=AugmentConfig(), seed=0)
    keys = iter(EpochSampler(len(samples), 8, seed=0))
    first = next(keys)
    row["seconds_to_first_key"] = time.process_time() - started
    chosen = np.random.default_rng(1).integers(0, num_images, 5000).tolist()
    started = time.process_time()
    for index in chosen:
        dataset.target(index)
    row["target_us"] = (time.process_time() - started) / len(chosen) * 1e6
    collate([samples[key] for key in first], samples.tasks)
    started = time.process_time()
    for some in islice(keys, 16):
        collate([samples[key] for key in some], samples.tasks)
    row["images_per_second"] = 16 * 8 / (time.process_time() - started)
    stream = batches([(samples, 4)], num_workers=2)
    for _ in range(8):
        next(stream)
    workers = [memory(str(child.pid)) for child in multiprocessing.active_children()]
    row["workers_mib"] = [worker for worker in workers if worker is not None]
    stream.close()  # type: ignore[attr-defined]
    return row


def measure_reading(root: Path, num_images: int) -> dict[str, Any]:
    path = root / "annotations/instances_large.json"
    (root / "large").symlink_to(root / "train")
    names = sorted(entry.name for entry in (root / "train").iterdir())
    rng = np.random.default_rng(0)
    with path.open("w") as file:
        file.write('{"categories": [{"id": 1, "name": "person"}, {"id": 2, "name": "thing"}], "images": [')
        for i in range(num_images):
            entry = {"id": i, "file_name": names[i % len(names)], "width": WIDTH, "height": HEIGHT}
            file.write((", " if i else "") + json.dumps(entry))
        file.write('], "annotations": [')
        for start in range(0, num_images * BOXES, 100_000):
            stop = min(start + 100_000, num_images * BOXES)
            corners = (rng.random((stop - start, 4)) * [300, 200, 300, 200] + 1).round(2).tolist()
            entries = [
                {"id": k, "image_id": k // BOXES, "category_id": 1 + k % 2, "bbox": b, "area": 9.5, "iscrowd": 0}
                for k, b in enumerate(corners, start=start)
            ]
            file.write((", " if start else "") + json.dumps(entries)[1:-1])
        file.write("]}")
    del corners, entries
    gc.collect()
    before = memory()
    started = time.process_time()
    dataset = read_coco(root, "large")
    seconds = time.process_time() - started
    assert len(dataset.annotations) == num_images * BOXES
    after = memory()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (MIB if sys.platform == "darwin" else 1024)
    return {
        "images": num_images,
        "boxes": len(dataset.annotations),
        "file_mib": path.stat().st_size / MIB,
        "seconds": seconds,
        "rss_growth_mib": None if before is None or after is None else after["rss"] - before["rss"],
        "peak_growth_mib": None if before is None else peak - before["rss"],
    }


def in_a_process(part: str, root: Path, num_images: int) -> dict[str, Any]:
    """Measure in a fresh process."""
    command = [sys.executable, __file__, "--part", part, "--root", str(root), "--images", str(num_images)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True)
    row: dict[str, Any] = json.loads(done.stdout)
    return row


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=5, help="turns per decoder")
    parser.add_argument("--images", type=int, default=96, help="images per turn")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--large", action="store_true", help="also up to 2 million images; takes 3 GiB and minutes")
    parser.add_argument("--quick", action="store_true", help="a smoke test with few, small images; writes no file")
    parser.add_argument("--out", type=Path, help="result file; default: benchmarks/results/DATE-data.json")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--part", choices=["growth", "reading"], help=argparse.SUPPRESS)
    parser.add_argument("--root", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    if args.part:
        measure = measure_growth if args.part == "growth" else measure_reading
        print(json.dumps(measure(args.root, args.images)))
        return
    growth, reading = GROWTH, READING
    if args.quick:
        args.turns, args.images, growth, reading = 1, 8, (200, 2000), 2000
    say = sys.stderr if args.json else sys.stdout
    now = datetime.now(UTC)
    result: dict[str, Any] = {
        "benchmark": "data",
        "date": now.strftime("%Y-%m-%d %H:%M UTC"),
        "command": " ".join(["python benchmarks/data.py", *argv]),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count(), "python": platform.python_version()},
    }
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        result["bytes_per_picture"] = write_images(root, 8 if args.quick else 64)
        result["samples"] = measure_samples(root, args)
        print(f"{result['bytes_per_picture'] / 1024:.0f} KiB per image of {WIDTH}x{HEIGHT}", file=say)
        print("".join(f"{name:>14}" for name in ("task", "decoder", "images/s", "x Pillow", *STAGES)), file=say)
        for row in result["samples"]:
            cells = [row["task"], row["decoder"], f"{row['images_per_second']:.0f}", f"{row['times_pillow']:.2f}"]
            print("".join(f"{c:>14}" for c in [*cells, *(f"{row['share'][s]:.0%}" for s in STAGES)]), file=say)
        if args.large:
            result["growth"] = [in_a_process("growth", root, count) for count in growth]
            for row in result["growth"]:
                own = ", ".join(f"{w['uss']:.0f} (PSS {w['pss']:.0f})" for w in row["workers_mib"])
                print(
                    f"{row['images']} images, {row['boxes']} boxes: arrays {row['arrays_mib']:.0f} MiB, resident size "
                    f"+{row['rss_growth_mib'] or 0:.0f} MiB, ready in {row['seconds_to_first_key']:.2f} s, "
                    f"{row['target_us']:.0f} us per target, {row['images_per_second']:.0f} images/s, "
                    f"workers' own MiB {own}",
                    file=say,
                )
            result["reading"] = row = in_a_process("reading", root, reading)
            print(
                f"reading {row['images']} images, {row['boxes']} boxes, {row['file_mib']:.0f} MiB: "
                f"{row['seconds']:.0f} s, resident size +{row['rss_growth_mib'] or 0:.0f} MiB, "
                f"peak +{row['peak_growth_mib'] or 0:.0f} MiB",
                file=say,
            )
    if args.out is not None or not args.quick:
        path = args.out or Path(__file__).parent / "results" / f"{now:%Y-%m-%d}-data.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written to {path}", file=say)
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))

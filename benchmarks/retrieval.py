"""Recall of images by sentences and of sentences by images: by embeddings alone, and with the best ordered by matching.

    python benchmarks/retrieval.py --checkpoint runs/matching --data world --limit 1000

Sentences are the captions of the images, each counted once. What is found is right if it is a caption of the image, or
if the generated image's annotations say that it is true. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from machine import machine
from tqdm import tqdm

from pix2seq import Predictor
from pix2seq.data.dataset import open_dataset
from pix2seq.data.image import read_record_image
from pix2seq.data.shapes.truth import facts_of
from pix2seq.metrics.sentences import best, recalls

IMAGES_AT_ONCE = 32


def main() -> None:
    """Measure, and print the numbers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--limit", type=int, default=0, help="only the first N images")
    parser.add_argument("--best", type=int, default=100, help="how many of the best matching puts in order")
    args = parser.parse_args()
    at_start = machine()
    predictor = Predictor.from_pretrained(args.checkpoint)
    dataset = open_dataset(args.data, args.split)
    names = {category.label: category.name for category in dataset.categories}
    targets = [dataset.target(index) for index in range(min(args.limit or len(dataset), len(dataset)))]
    texts = list(dict.fromkeys(text for target in targets for text in target.captions))
    truths = [facts_of(target, names=names) for target in targets]

    def is_true(image: int, text: int) -> bool:
        truth = truths[image]
        return texts[text] in targets[image].captions or (truth is not None and truth.say(texts[text]))

    started = time.perf_counter()
    images = [
        image
        for start in range(0, len(targets), IMAGES_AT_ONCE)
        for image in predictor.encode_batch(
            [read_record_image(target.image) for target in targets[start : start + IMAGES_AT_ONCE]]
        )
    ]
    image_vectors, text_vectors = predictor.embed(images), predictor.embed_text(texts)
    images_of, texts_of = best(text_vectors, image_vectors, args.best), best(image_vectors, text_vectors, args.best)
    embedded = time.perf_counter()
    pairs = {(image, text) for image, top in enumerate(texts_of) for text in top}
    pairs |= {(image, text) for text, top in enumerate(images_of) for image in top}
    wanted: dict[int, list[int]] = {}
    for image, text in sorted(pairs):
        wanted.setdefault(image, []).append(text)
    scores: dict[tuple[int, int], float] = {}
    for image, asked in tqdm(wanted.items()):
        found = predictor.match(images[image], [texts[text] for text in asked]).tolist()
        scores |= {(image, text): score for text, score in zip(asked, found, strict=True)}
    matched = time.perf_counter()

    def ordered(tops: Sequence[Sequence[int]], score: Callable[[int, int], float]) -> list[list[int]]:
        return [sorted(top, key=lambda each: -score(query, each)) for query, top in enumerate(tops)]

    def recall(images_of: Sequence[Sequence[int]], texts_of: Sequence[Sequence[int]]) -> dict[str, float | None]:
        by_text = [[is_true(image, text) for image in top] for text, top in enumerate(images_of)]
        by_image = [[is_true(image, text) for text in top] for image, top in enumerate(texts_of)]
        return recalls("text_to_image", by_text) | recalls("image_to_text", by_image)

    numbers = {
        "contrast": recall(images_of, texts_of),
        "matching": recall(
            ordered(images_of, lambda text, image: scores[image, text]),
            ordered(texts_of, lambda image, text: scores[image, text]),
        ),
        "num_images": len(images),
        "num_sentences": len(texts),
        "best": args.best,
        "seconds_to_embed": round(embedded - started, 2),
        "matches_per_second": round(len(scores) / (matched - embedded), 1),
        "machine": at_start,
    }
    print(json.dumps(numbers, indent=2))


if __name__ == "__main__":
    main()

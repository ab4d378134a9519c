"""Milliseconds to search stored embeddings: exact, as `pix2seq search` does, without the model that embeds a query.

    python benchmarks/search.py [--images 100000] [--dim 128] [--queries 100] [--threads 2] [--json]

The embeddings are random unit vectors, which cost as much as those of images. `seconds_to_open` is the time to read the
names and map the embeddings, once. CPU time leaves out what other processes do on a busy machine. Dated results:
benchmarks/results/.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import machine

from pix2seq.cli import run_guarded
from pix2seq.data.image_index import SHARD_IMAGES, ImageIndex, Stamp

WARM_UP = 3  # queries that are not counted


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128, help="numbers of an embedding")
    parser.add_argument("--queries", type=int, default=100)
    parser.add_argument("--top", type=int, default=100, help="images to find")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    rng = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        index = ImageIndex.create(folder, root=folder, checkpoint=folder, model="random")
        started = time.perf_counter()
        for first in range(0, args.images, SHARD_IMAGES):
            count = min(SHARD_IMAGES, args.images - first)
            images = [Stamp(f"{first // 10_000:04d}/{number:08d}.jpg", 0, 0) for number in range(first, first + count)]
            index.add(images, _units(rng, count, args.dim))
        written = time.perf_counter()
        index = ImageIndex(folder)
        opened = time.perf_counter()
        milliseconds, of_cpu = [], []
        for query in _units(rng, args.queries + WARM_UP, args.dim):
            begun, cpu = time.perf_counter(), time.process_time()
            found = index.nearest(query, args.top)
            of_cpu.append(1e3 * (time.process_time() - cpu))
            milliseconds.append(1e3 * (time.perf_counter() - begun))
            assert len(found) == min(args.top, args.images)
        size = sum(path.stat().st_size for path in folder.iterdir())
    result: dict[str, Any] = {
        "benchmark": "search",
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M UTC}",
        "command": " ".join(["python benchmarks/search.py", *argv]),
        "machine": machine(),
        "images": args.images,
        "dim": args.dim,
        "bytes": size,
        "seconds_to_write": round(written - started, 3),
        "seconds_to_open": round(opened - written, 3),
        "ms_per_query": _spread(milliseconds[WARM_UP:]),
        "cpu_ms_per_query": _spread(of_cpu[WARM_UP:]),
    }
    print(json.dumps(result) if args.json else json.dumps(result, indent=1))


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {name: round(float(np.percentile(values, share)), 3) for name, share in (("median", 50), ("p95", 95))}


def _units(rng: np.random.Generator, count: int, dim: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    vectors = rng.normal(size=(count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))

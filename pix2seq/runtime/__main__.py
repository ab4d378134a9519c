"""`python -m pix2seq.runtime MODEL_DIR IMAGE...`: ask an exported model, and print one JSON object for each image."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from pix2seq.drawing import Canvas
from pix2seq.errors import InputError
from pix2seq.files import report_write_errors
from pix2seq.runtime.runner import Runner


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2, after one line, for what a user can mend."""
    parser = argparse.ArgumentParser(prog="python -m pix2seq.runtime", description=__doc__)
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="folder that pix2seq export --format onnx wrote")
    parser.add_argument("images", type=Path, nargs="+", metavar="IMAGE")
    parser.add_argument("--task", help="tasks, separated by commas; by default all that the model knows")
    parser.add_argument("--draw", type=Path, metavar="DIR", help="folder for a drawing of each image, NAME.png")
    parser.add_argument("--min-score", type=float, default=0.3, help="least score of a drawn box; JSON has them all")
    parser.add_argument("--seed", type=int, default=0, help="of sampling, 0 to 2**64 - 1")
    parser.add_argument("--threads", type=int, help="of one operation; by default all cores")
    args = parser.parse_args(argv)
    try:
        runner = Runner(args.model, num_threads=args.threads)
        tasks = list(runner.tasks) if args.task is None else [name.strip() for name in args.task.split(",")]
        for path in args.images:
            content = answer(runner, path, tasks, args.draw, min_score=args.min_score, seed=args.seed)
            print(json.dumps(content), flush=True)
    except InputError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


def answer(
    runner: Runner, path: Path, tasks: Sequence[str], drawings: Path | None, *, min_score: float, seed: int
) -> dict[str, object]:
    """Return what NAME.json of `pix2seq predict` holds, and draw it into a folder if one is given."""
    image = runner.encode(path)
    answers = runner.predict(image, tasks, seed=seed)
    width, height = image.size
    content: dict[str, object] = {"image": path.name, "width": width, "height": height, "instances": [], "captions": []}
    canvas = Canvas(image.pixels, min_score=min_score)
    for name, found in answers.items():
        content |= runner.tasks[name].to_json(found)
        runner.tasks[name].draw(canvas, found)
    if drawings is not None:
        with report_write_errors(drawings, "writing a drawing", then="ask again"):
            drawings.mkdir(parents=True, exist_ok=True)
            canvas.finish().save(drawings / f"{path.stem}.png")
    return content


if __name__ == "__main__":
    sys.exit(main())

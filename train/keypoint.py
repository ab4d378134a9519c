"""Train keypoint: `python train/keypoint.py --config configs/keypoint_shapes.yaml data=DIR out=DIR`.

The same as `pix2seq train --task keypoint`. What happens, in order, is `pix2seq/training/loop.py`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from pix2seq.cli import add_train, run_guarded


def _main(argv: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_train(parser, task="keypoint")
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    sys.exit(run_guarded(_main, sys.argv[1:]))

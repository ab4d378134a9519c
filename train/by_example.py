"""Train by example: `python train/by_example.py --config configs/by_example_shapes.yaml data=DIR out=DIR`.

The same as `pix2seq train --task by_example`. Read `pix2seq/training/loop.py` for the steps of a run.
"""

import sys

if __name__ == "__main__":
    from pix2seq.cli import main

    sys.exit(main(["train", "--task", "by_example", *sys.argv[1:]]))

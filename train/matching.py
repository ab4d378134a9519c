"""Train matching of images and sentences: `python train/matching.py --config configs/matching_shapes.yaml data=DIR`.

The same as `pix2seq train --task matching`. Read `pix2seq/training/loop.py` for the steps of a run.
"""

import sys

if __name__ == "__main__":
    from pix2seq.cli import main

    sys.exit(main(["train", "--task", "matching", *sys.argv[1:]]))

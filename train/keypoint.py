"""Train keypoint: `python train/keypoint.py --config configs/keypoint_shapes.yaml data=DIR out=DIR`.

The same as `pix2seq train --task keypoint`. Read `pix2seq/training/loop.py` for the steps of a run.
"""

import sys

if __name__ == "__main__":
    from pix2seq.cli import main

    sys.exit(main(["train", "--task", "keypoint", *sys.argv[1:]]))

"""Train clicks on objects: `python train/prompted.py --config configs/prompted_shapes.yaml data=DIR out=DIR`.

The same as `pix2seq train --task prompted`. Read `pix2seq/training/loop.py` for the steps of a run.
"""

import sys

if __name__ == "__main__":
    from pix2seq.cli import main

    sys.exit(main(["train", "--task", "prompted", *sys.argv[1:]]))

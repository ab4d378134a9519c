"""Train several tasks in one model: `python train/multi_task.py --task a,b --config FILE data=DIR out=DIR`.

The same as `pix2seq train --task a,b`. Read `pix2seq/training/loop.py` for the steps of a run.
"""

import sys

if __name__ == "__main__":
    from pix2seq.cli import main

    sys.exit(main(["train", *sys.argv[1:]]))

"""Train finding objects by words: `python train/by_words.py --config configs/by_words_shapes.yaml data=DIR out=DIR`.

The same as `pix2seq train --task by_words`. Read `pix2seq/training/loop.py` for the steps of a run.
"""

import sys

if __name__ == "__main__":
    from pix2seq.cli import main

    sys.exit(main(["train", "--task", "by_words", *sys.argv[1:]]))

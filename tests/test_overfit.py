"""Eight real images, learned by heart: boxes, outlines, keypoints and captions in one model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
METRICS = ("AP50", "segmentation/true_boxes/AP50", "keypoint/true_boxes/AP50", "captioning/BLEU-4")


@pytest.mark.slow
def test_eight_real_images_reach_nine_tenths_in_every_task(shared, tmp_path):
    command = [sys.executable, "benchmarks/overfit.py", str(shared / "data/coco_mini"), "--out", str(tmp_path / "o")]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    print(done.stdout)
    metrics = json.loads(done.stdout.splitlines()[-1])["metrics"]
    assert {name: metrics[name] >= 0.9 for name in METRICS} == dict.fromkeys(METRICS, True)

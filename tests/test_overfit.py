"""Sixteen real pictures, learned by heart."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_sixteen_real_pictures_reach_ap50_of_nine_tenths(shared, tmp_path):
    import json

    command = [sys.executable, "benchmarks/overfit.py", str(shared / "data/coco_mini"), "--out", str(tmp_path / "o")]
    done = subprocess.run([*command, "--json"], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout.splitlines()[-1])["metrics"]["AP50"] >= 0.9

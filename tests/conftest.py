"""Fixtures and settings for all tests."""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings

ROOT = Path(__file__).resolve().parent.parent

# Set before torch is imported; processes that tests start inherit it. More threads make small tensors slower, and the
# cores are there for more tests at a time (`make test`).
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as commands do; see `pix2seq.cli`
os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # no request to the registry at import

settings.register_profile("local", deadline=None)
settings.register_profile("ci", deadline=None, derandomize=True, database=None, print_blob=True)
settings.load_profile("ci" if os.environ.get("CI") else "local")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip tests marked `gpu` without a GPU."""
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of reference arrays and small data sets, beside the repository."""
    folder = ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"the reference arrays and data sets are not at {folder}")
    return folder


@pytest.fixture(scope="session")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten easy images for training and four for evaluation, shared by the runs of many tests."""
    from pix2seq.data.shapes import write_shapes

    folder = tmp_path_factory.mktemp("shapes")
    write_shapes(folder, num_train=10, num_val=4, size=32, seed=0, max_objects=3, easy=True, workers=1)
    return folder


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixteen images for training and five for evaluation, with annotations for every task."""
    from pix2seq.data.shapes import write_shapes

    folder = tmp_path_factory.mktemp("four_tasks") / "shapes"
    write_shapes(folder, num_train=16, num_val=5, size=48, seed=1, workers=1)
    return folder


@pytest.fixture(scope="session")
def run(data: Path) -> Path:
    """A run of four tasks on `data` with `tiny_settings.TINY`. Tests copy what they change."""
    from tiny_settings import ALL, TINY

    from pix2seq.cli import main

    out = data.parent / "run"
    assert main(["train", "--task", ALL, f"data={data}", f"out={out}", *TINY]) == 0
    return out


@pytest.fixture(scope="session")
def parity_ops(shared: Path) -> Mapping[str, np.ndarray]:
    """Inputs and outputs of the official code's pure functions."""
    return np.load(shared / "parity" / "ops.npz")

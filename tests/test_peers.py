"""The comparison with torchvision's detectors runs, and gives every detector what it says it gives."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from pix2seq import tasks
from pix2seq.data.dataset import open_dataset
from pix2seq.geometry.affine import fit_affine
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.training.config import config_file, load_config
from pix2seq.vocab import PAD, Vocab

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"
TINY = """
steps: 1
batch_size: 2
schedule: {warmup_steps: 1}
ema_decay: 0.5
model:
  image_size: [32, 32]
  encoder: {name: vit, stem: conv, dim: 16, num_layers: 1, num_heads: 2, mlp_dim: 16, drop_path: 0.0}
  decoder: {dim: 16, num_layers: 1, num_heads: 2, mlp_dim: 16, max_seq_len: 64, dropout: 0.0, drop_path: 0.0}
  vocab: {num_bins: 32, size: 1040}
detection: {max_objects: 5, noise_objects: 1}
"""


@pytest.fixture
def peers(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(tasks, "_registered", dict(tasks._registered))  # its own task ends with the test
    monkeypatch.delitem(sys.modules, "peers", raising=False)
    import peers

    return peers


class Oracle(torch.nn.Module):
    """Answers with the annotations of the images of a data set in order, as torchvision's detectors do."""

    def __init__(self, dataset, size, numbers):
        super().__init__()
        self.dataset, self.size, self.numbers, self.index = dataset, size, numbers, 0

    def forward(self, images):
        assert images[0].shape == (3, *self.size)
        target = self.dataset.target(self.index)
        self.index += 1
        affine = fit_affine((target.image.height, target.image.width), self.size)
        boxes = torch.from_numpy(affine.boxes(target.boxes_xyxy))
        labels = torch.tensor([self.numbers[label] for label in target.labels.tolist()])
        return [{"boxes": boxes, "labels": labels, "scores": torch.linspace(0.9, 0.5, len(boxes))}]


def test_the_annotations_themselves_score_1(peers, shapes):
    dataset = open_dataset(shapes, "val")
    categories = sorted(dataset.categories, key=lambda category: category.label)
    numbers = {category.label: number for number, category in enumerate(categories, start=1)}
    assert peers.score_peer(Oracle(dataset, (40, 60), numbers), categories, dataset, (40, 60)) == {"AP": 1, "AP50": 1}
    wrong = {label: number % len(numbers) + 1 for label, number in numbers.items()}
    assert peers.score_peer(Oracle(dataset, (40, 60), wrong), categories, dataset, (40, 60))["AP"] < 0.5


def test_torchvisions_detectors_see_the_images_and_boxes_of_the_data_set(peers, shapes):
    dataset = open_dataset(shapes, "train")
    config = load_config(config_file("demo.yaml"), ["augment.enabled=false"], data=str(shapes))
    labels = sorted(category.label for category in dataset.categories)
    samples = peers.peer_samples(config, dataset, (64, 64), np.random.default_rng(0))
    seen = [next(samples) for _ in range(len(dataset))]
    boxes = sorted(map(tuple, np.concatenate([each["boxes"] for _, each in seen]).tolist()))
    targets = [dataset.target(index) for index in range(len(dataset))]
    expected = sorted(map(tuple, (2 * np.concatenate([target.boxes_xyxy for target in targets])).tolist()))
    np.testing.assert_allclose(boxes, expected, atol=1e-3)  # 32 pixels became 64
    found = sorted(labels[number - 1] for _, each in seen for number in each["labels"].tolist())
    assert found == sorted(label for target in targets for label in target.labels.tolist())
    assert all(image.shape == (3, 64, 64) and image.min() >= 0 and image.max() <= 1 for image, _ in seen)


def test_padded_sequences_have_one_length_and_score_the_same_tokens(peers, shapes):
    dataset = open_dataset(shapes, "train")
    vocab = Vocab(num_bins=32, size=1040)
    config = DetectionConfig(max_objects=6, noise_objects=0)
    plain = Detection(config, vocab, dataset.categories)
    padded = peers.PaddedDetection(config, vocab.with_tasks(["padded_detection"]), dataset.categories)
    lengths = set()
    for index in range(len(dataset)):
        target = replace(dataset.target(index), captions=())
        (short,), (long,) = (task.examples(target, (32, 32), np.random.default_rng(5)) for task in (plain, padded))
        count = len(short.targets)
        for name in ("inputs", "targets", "weights"):
            np.testing.assert_array_equal(getattr(long, name)[:count], getattr(short, name))
        assert (long.inputs[count:] == PAD).all()
        assert not long.weights[count:].any()
        lengths.add(len(long.prompt) + len(long.targets))
    assert lengths == {2 + 5 * 6}


@pytest.mark.parametrize(("name", "start"), [("tuned", "checkpoints/shapes"), ("ours", None), ("earlier", None)])
def test_only_the_tuned_model_starts_from_another(peers, shapes, tmp_path, monkeypatch, name, start):
    class Trained(Exception):
        """Raised in place of training."""

    def train(config, steps, out):
        raise Trained(config.init)

    monkeypatch.setattr(peers, "processor_time", train)
    base = load_config(config_file("detection_voc.yaml"), [], data=str(shapes), tasks=["detection"])
    with pytest.raises(Trained) as trained:
        peers.train_ours(base, name, 1, tmp_path)
    assert trained.value.args == (start,)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["ours", "earlier", "ssdlite320_mobilenet_v3_large", "fasterrcnn_mobilenet_v3_large_320_fpn"]
)
def test_every_detector_trains_for_its_minutes_and_is_scored(shapes, tmp_path, name):
    (tmp_path / "tiny.yaml").write_text(TINY)
    options = ["--config", str(tmp_path / "tiny.yaml"), "--minutes", "0.02", "--threads", "1", "--seeds", "3", "--json"]
    command = [sys.executable, "benchmarks/peers.py", str(shapes), *options, "--models", name]
    done = subprocess.run(command, cwd=BENCHMARKS.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(done.stdout)
    (row,) = result["rows"]
    assert (row["model"], row["seed"], result["machine"]["threads"]) == (name, 3, 1)
    assert row["images"] == 2 * row["steps"] > 0
    assert 0 < row["processor_seconds"] < 60
    assert 0 <= row["AP"] <= row["AP50"] <= 1

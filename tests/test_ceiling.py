"""What the format costs: a model that says exactly what training teaches is asked by the predictor, and scored.

Sequences are written as for training, and read on the predictor's own way back to pixels. So a fault on either way, or
a difference between the two, costs average precision.
"""

from types import SimpleNamespace

import numpy as np
import pytest
import torch.nn.functional as F
from pycocotools import mask as mask_utils

from pix2seq import Predictor
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.samples import SampleMaker
from pix2seq.data.transforms import AugmentConfig
from pix2seq.evaluation import evaluate
from pix2seq.model.config import DecoderConfig, EncoderConfig, ModelConfig
from pix2seq.model.decoding.generate import Completion
from pix2seq.model.pix2seq import build_model
from pix2seq.tasks import get_task
from pix2seq.tokenizers.text import WordTokenizer
from pix2seq.types import Category, ImageRecord, Target
from pix2seq.vocab import PAD, Vocab

PERSON = Category(1, 1, "person", ("nose", "left_hand", "right_hand", "tail"), ((0, 1), (0, 2), (0, 3)))
CATEGORIES = (PERSON, Category(3, 8, "kite"))
SIZES = [(90, 120), (150, 60), (40, 33), (100, 200), (48, 48), (160, 90)]  # width, height
WIDTH = 16  # of the model
BLUES = 5  # levels of blue between two images


class Scenes:
    """Random objects in images of many shapes, some of them in the corners, and a crowd."""

    root, split, categories = "memory", "val", CATEGORIES

    def __init__(self):
        rng = np.random.default_rng(0)
        self.targets = [self.scene(i, width, height, rng) for i, (width, height) in enumerate(SIZES)]
        self.images = [target.image for target in self.targets]
        self.annotations = SimpleNamespace(
            labels=np.concatenate([target.labels for target in self.targets]), all_captions=list
        )

    def scene(self, number, width, height, rng):
        rings, points = [], []
        for corner in [(0, 0), (1, 1), (1, 0), (0.5, 0.4)]:
            size = rng.uniform(0.3, 0.45, 2) * [width, height]
            origin = (np.array([width, height]) - size) * corner
            angles = np.arange(9) / 9 * 2 * np.pi
            radii = rng.uniform(0.6, 1, 9)[:, None]
            ring = radii * np.column_stack([np.cos(angles), np.sin(angles)])
            ring = (ring - ring.min(0)) / np.ptp(ring, axis=0)
            rings.append((ring * size + origin).astype(np.float32))
            xy = rings[-1][[0, 2, 4, 6]] * 0.9 + rings[-1].mean(0) * 0.1
            points.append(np.column_stack([xy, rng.permutation([0, 1, 2, 2])]))
        labels = np.array([1, 3, 1, 1])
        points = np.array(points, np.float32)
        points[points[..., 2] == 0] = 0
        points[labels == 3] = 0
        crowd = np.arange(4) == (2 if number == 0 else 4)
        masks = [mask_utils.frPyObjects([ring.ravel().tolist()], height, width)[0] for ring in rings]
        return Target(
            image=ImageRecord(number, None, width, height),
            boxes_xyxy=np.array([[*ring.min(0), *ring.max(0)] for ring in rings], np.float32),
            labels=labels,
            areas=mask_utils.area(masks).astype(np.float32),
            iscrowd=crowd,
            annotation_ids=np.arange(4),
            segmentations=tuple(m if c else [r] for m, c, r in zip(masks, crowd, rings, strict=True)),
            keypoints=points,
            captions=(f"Image {number}, of {width} by {height} - a kite.",),
        )

    def __len__(self):
        return len(self.targets)

    def target(self, index):
        return self.targets[index]


def coloured(record, number):
    """An image of which each pixel tells the number of the image, and about where it lies."""
    red, green = np.linspace(0, 255, record.width), np.linspace(0, 255, record.height)
    pixels = np.empty((record.height, record.width, 3), np.uint8)
    pixels[..., 0], pixels[..., 1], pixels[..., 2] = red, green[:, None], number * BLUES
    return pixels


class Playback:
    """A model that knows images and crops by their colours, and answers each prompt as training teaches."""

    def __init__(self, dataset, predictor):
        (task,) = predictor.tasks.values()
        size = predictor.model.config.image_size
        maker = SampleMaker(dataset.categories, [task], size=size, augment=AugmentConfig(enabled=False))
        rng = np.random.default_rng(0)
        self.taught, self.untaught = [], []
        for index in range(len(dataset)):
            target = dataset.target(index)
            image = coloured(target.image, index)
            for sample in [maker.sample(target, image, i, rng, [rng]) for i in task.samples(target)]:
                self.taught += [(sample.image[0, 0].astype(int), example) for example in sample.examples[task.name]]

    def encode_with_maps(self, images):
        colours = (images[:, :, 0, 0] * 255).round()[:, None]  # the top left pixel, (B, 1, 3)
        return F.pad(colours, (0, WIDTH - 3)), ()

    def generate_mixed(self, memory, prompts, configs, *, memory_index, num_samples, generator):
        asked = zip(memory[memory_index][:, 0, :3].int(), prompts, configs, strict=True)
        found = [self.answer(colour.numpy(), prompt.numpy(), config) for colour, prompt, config in asked]
        return SimpleNamespace(completions=lambda count: [self.completion(ids, count) for ids in found])

    def answer(self, colour, prompt, config):
        """What is taught for a prompt, which may differ by a bin: the frame of an input is not rounded to pixels."""
        for taught_colour, example in self.taught:
            same_prompt = len(example.prompt) == len(prompt) and (example.prompt[5:] == prompt[5:]).all()
            if same_prompt and np.abs(example.prompt - prompt).max() <= 1 and np.abs(taught_colour - colour).max() <= 1:
                assert len(example.targets) <= config.max_new_tokens
                return example.targets
        self.untaught.append((colour.tolist(), prompt.tolist()))
        return np.array([PAD])

    def completion(self, ids, num_samples):
        rows = np.tile(ids, (num_samples, 1))
        zeros = np.zeros(rows.shape, np.float32)
        return Completion(rows, zeros, rows, zeros, np.zeros(num_samples, bool))


def scores(monkeypatch, dataset, name, size, settings):
    """Evaluate perfect answers; return the metrics, and what was asked without being taught."""
    text = WordTokenizer.build(c for i in range(len(dataset)) for c in dataset.target(i).captions)
    config = ModelConfig(
        image_size=size,
        encoder=EncoderConfig("vit", dim=WIDTH, num_layers=1, num_heads=2, mlp_dim=16),
        decoder=DecoderConfig(dim=WIDTH, num_layers=1, num_heads=2, mlp_dim=16),
        vocab=Vocab().with_text(text.size),
    )
    model = build_model(config, dataset.categories, text)
    task_type = get_task(name)
    model.task_settings = {name: task_type(task_type.config_type(**settings), config.vocab, (), text).settings()}
    predictor = Predictor(model)
    playback = Playback(dataset, predictor)
    monkeypatch.setattr(model, "encode_with_maps", playback.encode_with_maps)
    monkeypatch.setattr(model, "generate_mixed", playback.generate_mixed)
    numbers = {dataset.target(i).image.id: i for i in range(len(dataset))}
    read = lambda record: coloured(record, numbers[record.id])  # noqa: E731
    monkeypatch.setattr("pix2seq.evaluation.read_record_image", read)
    return evaluate(predictor, dataset).metrics, playback.untaught


CASES = {
    "boxes": ("detection", {"noise_objects": 0, "class_corruption": "none"}, "AP", 0.99),
    "masks": ("segmentation", {"num_samples": 1, "max_objects": 1000}, "segmentation/true_boxes/AP", 0.98),
    "voted masks": ("segmentation", {"num_samples": 3, "max_objects": 1000}, "segmentation/true_boxes/AP50", 1.0),
    "keypoints": ("keypoint", {"mask_inputs": False}, "keypoint/true_boxes/AP", 0.999),
    "uncropped keypoints": ("keypoint", {"crop": False, "max_objects": 1000}, "keypoint/true_boxes/AP", 0.999),
    "captions": ("captioning", {}, "captioning/BLEU-4", 1.0),
}


@pytest.mark.parametrize("size", [(96, 160), (160, 96)], ids=["wide", "high"])
@pytest.mark.parametrize("case", CASES)
def test_perfect_answers_score_nearly_full_marks_on_any_canvas(monkeypatch, case, size):
    name, settings, metric, least = CASES[case]
    metrics, untaught = scores(monkeypatch, Scenes(), name, size, settings)
    print(f"{case} {metrics[metric]:.4f}")
    assert metrics[metric] >= least
    assert not untaught


@pytest.mark.parametrize(
    ("case", "least"), [("boxes", 0.990), ("masks", 0.986), ("keypoints", 0.999), ("uncropped keypoints", 0.999)]
)
def test_perfect_answers_score_nearly_full_marks_on_real_images(monkeypatch, shared, case, least):
    dataset = read_coco(shared / "data" / "coco_mini", "val")
    name, settings, metric, _ = CASES[case]
    metrics, _ = scores(monkeypatch, dataset, name, (640, 640), settings)
    print(f"{case} {metrics[metric]:.4f}")
    assert metrics[metric] >= least

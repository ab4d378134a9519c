"""Whatever the logits, every task gets a complete answer: boxes, polygons and points in the image, and words."""

import numpy as np
import pytest
import torch
from hostile_decoder import KINDS, HostileDecoder, logits_of_kind
from pycocotools import mask as mask_utils

from pix2seq.model.decoding.generate import Generated, generate_mixed
from pix2seq.tasks.captioning import Captioning, CaptioningConfig
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.tasks.segmentation import Segmentation, SegmentationConfig
from pix2seq.tokenizers.segmentation import decode_polygons
from pix2seq.tokenizers.text import SPECIAL_TOKENS, WordTokenizer
from pix2seq.types import Category
from pix2seq.vocab import PAD, Vocab

SEEDS = 10_000
PERSON = Category(1, 1, "person", ("nose", "left_hand", "right_hand"))
CATEGORIES = (PERSON, Category(2, 2, "heart"))
VOCAB = Vocab(num_bins=7, coord_base=104, text_base=111, num_text=6, size=118)
WORDS = WordTokenizer([*SPECIAL_TOKENS, "a", "red", "heart"])
NUM_OBJECTS, MAX_POINTS, MAX_WORDS = 3, 8, 6
IMAGE = (641, 427)  # width, height
SIZE = np.array(IMAGE, float)  # the model's input shows the image and nothing else
TASKS = {
    "detection": Detection(DetectionConfig(max_objects=NUM_OBJECTS), VOCAB, CATEGORIES),
    "detection with an end": Detection(DetectionConfig(max_objects=NUM_OBJECTS, noise_objects=0), VOCAB, CATEGORIES),
    "segmentation": Segmentation(SegmentationConfig(max_points=MAX_POINTS, num_samples=1), VOCAB, CATEGORIES),
    "keypoint": Keypoint(KeypointConfig(), VOCAB, CATEGORIES),
    "captioning": Captioning(CaptioningConfig(max_tokens=MAX_WORDS), VOCAB, CATEGORIES, WORDS),
}
BOX = np.array([[0.1, 0.2, 0.7, 0.9]])
PROMPTS = {
    name: torch.from_numpy(task.prompts(BOX, [PERSON])[0] if name in ("segmentation", "keypoint") else task.prompt())
    for name, task in TASKS.items()
}


def answer(names, logits, *, seed=0, num_samples=1, **changes):
    """Generate `num_samples` answers for each of the tasks `names`, from logits of a kind."""
    tasks = {name: TASKS[name].with_settings(**changes) for name in set(names)}
    configs = {name: task.generation() for name, task in tasks.items()}
    return generate_mixed(
        HostileDecoder(logits_of_kind(logits, seed), VOCAB.size),
        torch.zeros(1, 1, 1),
        [PROMPTS[name] for name in names],
        [configs[name] for name in names],
        num_samples=num_samples,
        generator=torch.Generator().manual_seed(seed),
    )


def part(out, rows):
    """Select rows of a result."""
    best = (None if each is None else each[rows] for each in (out.best_tokens, out.best_logprobs))
    return Generated(out.tokens[rows], out.logprobs[rows], *best, out.truncated[rows])


def check_detection(out, *, ends):
    real = out.tokens != PAD
    lengths = real.sum(1)
    assert (lengths % 5 == 0).all()
    assert (lengths <= 5 * NUM_OBJECTS).all() if ends else (lengths == 5 * NUM_OBJECTS).all()
    # All lists as one, without the padding after each.
    joined = Generated(
        *(each[real][None] for each in (out.tokens, out.logprobs, out.best_tokens, out.best_logprobs)), out.truncated
    )
    found = TASKS["detection"].instances(joined, 0, SIZE, IMAGE)
    assert len(found) == lengths.sum() // 5
    boxes = np.array([instance.box_xyxy for instance in found]).reshape(-1, 4)
    assert (boxes >= 0).all()
    assert (boxes <= np.tile(SIZE, 2)).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 0.99 * SIZE / (VOCAB.num_bins - 1)).all()
    scores = np.array([instance.score for instance in found])
    assert ((scores >= 0) & (scores <= 1)).all()


def check_segmentation(out):
    assert ((out.tokens == PAD).any(1)).all()  # an end
    for ids in np.unique(out.tokens.numpy(), axis=0):
        rings = decode_polygons(ids, VOCAB)
        points = np.concatenate(rings)
        assert min(len(ring) for ring in rings) >= 3
        assert len(points) + len(rings) - 1 == (ids != PAD).sum() / 2 <= MAX_POINTS
        assert points.min() >= 0
        assert points.max() <= 1
    for row in range(0, len(out.tokens), 100):
        rings, _ = TASKS["segmentation"].mask(out, slice(row, row + 1), SIZE, IMAGE)
        for ring in rings:
            assert (ring >= 0).all()
            assert (ring <= SIZE).all()


def check_keypoint(out):
    assert (out.tokens[:, : 2 * len(PERSON.keypoints)] != PAD).all()
    _, first = np.unique(out.tokens.numpy(), axis=0, return_index=True)
    for row in first:
        points = TASKS["keypoint"].points(out, int(row), PERSON, SIZE)
        assert points.shape == (3, 3)
        assert (points[:, :2] >= 0).all()
        assert (points[:, :2] <= SIZE).all()
        assert set(points[:, 2]) <= {1.0, 2.0}  # an invisible point gets its likeliest position
        likelihood, score = TASKS["keypoint"].scores(out, int(row), 0.5)
        assert 0 <= likelihood <= 1
        assert 0 <= score <= 1


def check_captioning(out):
    for row in np.unique(out.tokens.numpy(), axis=0, return_index=True)[1]:
        text, score = TASKS["captioning"].caption(out, int(row))
        assert 1 <= len(text.split()) <= MAX_WORDS - 1
        assert set(text.split()) <= {"a", "red", "heart"}
        assert score <= 0


def check(name, out):
    if name.startswith("detection"):
        check_detection(out, ends=name != "detection")
    else:
        {"segmentation": check_segmentation, "keypoint": check_keypoint, "captioning": check_captioning}[name](out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_ten_thousand_answers_to_any_logits_can_be_read(name, kind):
    out = answer([name], kind, num_samples=SEEDS)
    assert len(out.tokens) == SEEDS
    check(name, out)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_answers_in_mixed_batches_can_be_read(kind):
    names = list(TASKS)
    each = SEEDS // len(names)
    out = answer(names, kind, num_samples=each)
    for i, name in enumerate(names):
        check(name, part(out, slice(i * each, (i + 1) * each)))


SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 50.0, "top_p": 1.0},
    {"temperature": 1e-20},
    {"top_k": 1},
    {"top_k": 3, "top_p": 1.0},
    {"top_k": 5, "top_p": 0.9, "temperature": 0.5},
    {"top_p": 1e-6},
]


@pytest.mark.parametrize("sampling", SAMPLING, ids=str)
def test_any_way_of_sampling_can_be_read(sampling):
    names = list(TASKS)
    for seed, kind in enumerate(KINDS):
        out = answer(names * 20, kind, seed=seed, num_samples=3, **sampling)
        row_names = np.repeat(names * 20, 3)
        for name in names:
            check(name, part(out, torch.from_numpy(row_names == name)))


@pytest.mark.parametrize("kind", KINDS)
def test_polygons_of_any_logits_vote_on_a_mask_in_the_image(kind):
    copies, task = 4, TASKS["segmentation"].with_settings(num_samples=4)
    out = answer(["segmentation"] * 50, kind, num_samples=copies)
    for start in range(0, len(out.tokens), copies):
        rings, rle = task.mask(out, slice(start, start + copies), SIZE, IMAGE)
        likelihood, score = task.scores(out, slice(start, start + copies), 0.5)
        assert 0 <= likelihood <= 1
        assert score == 0.5
        for ring in rings:
            assert (ring >= 0).all()
            assert (ring <= SIZE).all()
        if rle is not None:
            assert mask_utils.decode(rle).shape == IMAGE[::-1]

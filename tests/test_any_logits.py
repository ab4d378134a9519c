"""Whatever the logits, every task reads a whole answer: boxes, masks and points in the image, and words."""

import numpy as np
import pytest
import torch
from hostile_decoder import KINDS, HostileDecoder, logits_of_kind
from pycocotools import mask as mask_utils

from pix2seq.model.decoding.generate import Completion, generate_mixed
from pix2seq.tasks.captioning import Captioning, CaptioningConfig
from pix2seq.tasks.detection import Detection, DetectionConfig
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.tasks.request import EncodedImage, Frame
from pix2seq.tasks.segmentation import Segmentation, SegmentationConfig
from pix2seq.tokenizers.segmentation import decode_polygons
from pix2seq.tokenizers.text import SPECIAL_TOKENS, WordTokenizer
from pix2seq.types import Category, Instance
from pix2seq.vocab import PAD, Vocab

SEEDS = 10_000
PERSON = Category(1, 1, "person", ("nose", "left_hand", "right_hand"))
CATEGORIES = (PERSON, Category(2, 2, "heart"))
VOCAB = Vocab(num_bins=7, coord_base=104, text_base=111, num_text=6, size=118)
WORDS = WordTokenizer([*SPECIAL_TOKENS, "a", "red", "heart"])
NUM_OBJECTS, MAX_POINTS, MAX_WORDS = 3, 8, 6
IMAGE = (641, 427)  # width, height
SIZE = np.array(IMAGE, float)
FRAME = Frame(np.zeros(2), SIZE)  # the model's input shows the image and nothing else
TASKS = {
    "detection": Detection(DetectionConfig(max_objects=NUM_OBJECTS), VOCAB, CATEGORIES),
    "detection with an end": Detection(DetectionConfig(max_objects=NUM_OBJECTS, noise_objects=0), VOCAB, CATEGORIES),
    "segmentation": Segmentation(SegmentationConfig(max_points=MAX_POINTS, num_samples=1), VOCAB, CATEGORIES),
    "keypoint": Keypoint(KeypointConfig(), VOCAB, CATEGORIES),
    "captioning": Captioning(CaptioningConfig(max_tokens=MAX_WORDS), VOCAB, CATEGORIES, WORDS),
}
BLANK = EncodedImage(torch.zeros(1, 1), np.zeros((*IMAGE[::-1], 3), np.uint8), IMAGE[::-1])
OBJECT = [Instance((100.0, 60.0, 500.0, 400.0), PERSON, 0.5)]


def request(name, **changes):
    """What a task asks about an image with one object."""
    task = TASKS[name].with_settings(**changes)
    return task.requests(BLANK, OBJECT if task.needs else None)[0]


def answer(names, logits, *, seed=0, num_samples=1, **changes):
    """Answers of tasks, one for each of `names`, `num_samples` times, under `logits` of a kind."""
    requests = {name: request(name, **changes) for name in set(names)}
    return generate_mixed(
        HostileDecoder(logits_of_kind(logits, seed), VOCAB.size),
        torch.zeros(1, 1, 1),
        [torch.from_numpy(requests[name].prompt) for name in names],
        [requests[name].generation for name in names],
        num_samples=num_samples,
        generator=torch.Generator().manual_seed(seed),
    ).completions(num_samples)


def joined(completions):
    """The samples of several prompts as those of one."""
    parts = [[each[name] for each in map(vars, completions)] for name in vars(completions[0])]
    return Completion(*(None if some[0] is None else np.concatenate(some) for some in parts))


def row_of(out, row):
    """One sample alone."""
    return Completion(*(None if each is None else each[row : row + 1] for each in vars(out).values()))


def check_detection(out, *, ends):
    said = out.tokens != PAD
    lengths = said.sum(1)
    assert out.best_tokens is not None
    assert (lengths % 5 == 0).all()
    assert (lengths <= 5 * NUM_OBJECTS).all() if ends else (lengths == 5 * NUM_OBJECTS).all()
    # All lists as one: padding only stands behind them.
    one = Completion(
        *(each[said][None] for each in (out.tokens, out.logprobs, out.best_tokens, out.best_logprobs)), out.truncated
    )
    found = TASKS["detection"].instances(one, FRAME, IMAGE)
    assert len(found) == lengths.sum() // 5
    boxes = np.array([instance.box_xyxy for instance in found]).reshape(-1, 4)
    assert (boxes >= 0).all()
    assert (boxes <= np.tile(SIZE, 2)).all()
    assert (boxes[:, 2:] - boxes[:, :2] >= 0.99 * SIZE / (VOCAB.num_bins - 1)).all()
    scores = np.array([instance.score for instance in found])
    assert ((scores >= 0) & (scores <= 1)).all()


def check_segmentation(out):
    assert ((out.tokens == PAD).any(1)).all()  # an end
    for ids in np.unique(out.tokens, axis=0):
        rings = decode_polygons(ids, VOCAB)
        points = np.concatenate(rings)
        assert min(len(ring) for ring in rings) >= 3
        assert len(points) + len(rings) - 1 == (ids != PAD).sum() / 2 <= MAX_POINTS
        assert points.min() >= 0
        assert points.max() <= 1
    for row in range(0, len(out.tokens), 100):
        rings, _ = TASKS["segmentation"].mask(out.tokens[row : row + 1], FRAME, IMAGE)
        for ring in rings:
            assert (ring >= 0).all()
            assert (ring <= SIZE).all()


def check_keypoint(out):
    assert (out.tokens[:, : 2 * len(PERSON.keypoints)] != PAD).all()
    _, first = np.unique(out.tokens, axis=0, return_index=True)
    for row in first:
        points = TASKS["keypoint"].points(row_of(out, row), PERSON, FRAME)
        assert points.shape == (3, 3)
        assert (points[:, :2] >= 0).all()
        assert (points[:, :2] <= SIZE).all()
        assert set(points[:, 2]) <= {1.0, 2.0}  # what is called invisible gets its likeliest place
        likelihood, score = TASKS["keypoint"].scores(row_of(out, row), 0.5)
        assert 0 <= likelihood <= 1
        assert 0 <= score <= 1


def check_captioning(out):
    for row in np.unique(out.tokens, axis=0, return_index=True)[1]:
        caption = TASKS["captioning"].caption(row_of(out, row))
        assert 1 <= len(caption.text.split()) <= MAX_WORDS - 1
        assert set(caption.text.split()) <= {"a", "red", "heart"}
        assert caption.score <= 0


def check(name, out):
    if name.startswith("detection"):
        check_detection(out, ends=name != "detection")
    else:
        {"segmentation": check_segmentation, "keypoint": check_keypoint, "captioning": check_captioning}[name](out)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", TASKS)
def test_ten_thousand_answers_to_any_logits_can_be_read(name, kind):
    (out,) = answer([name], kind, num_samples=SEEDS)
    assert len(out.tokens) == SEEDS
    check(name, out)


@pytest.mark.parametrize("kind", KINDS)
def test_ten_thousand_answers_in_mixed_batches_can_be_read(kind):
    names = list(TASKS)
    each = SEEDS // len(names)
    out = answer(names, kind, num_samples=each)
    for name, found in zip(names, out, strict=True):
        check(name, found)


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
        for position, name in enumerate(names):
            check(name, joined(out[position :: len(names)]))


@pytest.mark.parametrize("kind", KINDS)
def test_masks_of_any_logits_vote_on_a_mask_in_the_image(kind):
    copies, task = 4, TASKS["segmentation"].with_settings(num_samples=4)
    out = answer(["segmentation"] * 50, kind, num_samples=copies)
    for found in out:
        rings, rle = task.mask(found.tokens, FRAME, IMAGE)
        likelihood, score = task.scores(found, 0.5)
        assert 0 <= likelihood <= 1
        assert score == 0.5
        for ring in rings:
            assert (ring >= 0).all()
            assert (ring <= SIZE).all()
        if rle is not None:
            assert mask_utils.decode(rle).shape == IMAGE[::-1]

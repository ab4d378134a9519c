"""The reward of answers to clicks: numbers worked by hand, honest qualities, frames, and a run of its config."""

import json
from dataclasses import replace

import numpy as np
import pytest
from click_model import CONFIG, SIZE, VOCAB, untrained_predictor
from hypothesis import given
from hypothesis import strategies as st
from test_reward_tuning import QUICK, compare_log_probabilities, said

from pix2seq.cli import main
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.samples import TrainingSet
from pix2seq.data.shapes import write_shapes
from pix2seq.data.transforms import AugmentConfig
from pix2seq.examples import collate
from pix2seq.metrics.click_reward import box_reward, rating_reward
from pix2seq.tasks.prompted import Prompted
from pix2seq.tasks.request import EncodedImage
from pix2seq.tokenizers.prompted import quality_id
from pix2seq.training.config import config_file
from pix2seq.training.reward import RewardConfig, Rewards
from pix2seq.types import Clicks
from pix2seq.vocab import EOS, QUALITY

TRUE = (0, 0, 10, 10)
HALF = (0, 0, 10, 5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks") / "shapes"
    write_shapes(folder, num_train=12, num_val=2, size=64, seed=3, max_objects=4, workers=1)
    return folder


@pytest.fixture(scope="module")
def shapes(folder):
    return read_coco(folder, "train")


@pytest.fixture(scope="module")
def examples(shapes):
    """Sequences of all steps, with the object itself as what is meant, by step."""
    settings = {"rate_share": 1.0, "part_share": 0.0, "group_share": 0.0, "box_share": 0.0, "background_share": 1.0}
    task = Prompted(replace(CONFIG, even_points=40, max_points=60, **settings), VOCAB, shapes.categories)
    augment = AugmentConfig(scale_min=0.9, scale_max=1.1)
    samples = TrainingSet(shapes, task, size=SIZE, augment=augment, seed=0)
    found = {"find": [], "outline": [], "rate": []}
    for index in range(len(samples)):
        for example in samples[0, index].examples["prompted"]:
            found[task.summary(example).split(",")[0]].append(example)
    return task, found


@pytest.mark.parametrize(
    ("quality", "box", "true", "expected"),
    [
        (1.0, TRUE, TRUE, 1.0),
        (0.0, TRUE, TRUE, 0.5),  # right, and said to be wrong
        (0.5, HALF, TRUE, 0.5),
        (1.0, HALF, TRUE, 0.5 - 0.125),
        (0.0, (20, 20, 30, 30), TRUE, 0.0),
        (1.0, (20, 20, 30, 30), TRUE, -0.5),
        (0.0, TRUE, None, 0.0),  # a click on nothing
        (0.8, TRUE, None, -0.32),
        (0.0, (5, 5, 5, 9), TRUE, 0.0),  # a box without area
    ],
)
def test_a_box_is_worth_its_iou_less_what_was_wrongly_said_of_it(quality, box, true, expected):
    assert box_reward(quality, box, true) == pytest.approx(expected)


def test_a_rating_is_worth_more_the_nearer_it_is():
    assert [rating_reward(q, 0.7) for q in (0.7, 0.2, 1.0)] == pytest.approx([1.0, 0.75, 0.91])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
def test_the_best_quality_to_say_is_the_expected_iou(ious):
    """Of boxes (0, 0, 10, 10 * IoU)."""
    said_of = np.linspace(0, 1, 101)
    boxes = [(0, 0, 10, 10 * iou) for iou in ious]
    worth = [np.mean([box_reward(q, box, TRUE) for box in boxes]) for q in said_of]
    rated = [np.mean([rating_reward(q, iou) for iou in ious]) for q in said_of]
    assert said_of[np.argmax(worth)] == pytest.approx(np.mean(ious), abs=0.0051)
    assert said_of[np.argmax(rated)] == pytest.approx(np.mean(ious), abs=0.0051)


@given(st.floats(0, 1), st.floats(0, 1), st.floats(0, 1))
def test_a_better_box_is_never_worth_less_whatever_was_said(quality, iou, other):
    low, high = sorted([iou, other])
    assert box_reward(quality, (0, 0, 10, 10 * low), TRUE) <= box_reward(quality, (0, 0, 10, 10 * high), TRUE) + 1e-9


def test_what_was_annotated_has_the_highest_reward(examples):
    """In the frame that each step reads, whole or closeup."""
    task, found = examples
    judge = task.judge([])
    outlined = []
    for example in found["find"]:
        (right,) = judge(example, said(example.targets), SIZE).rewards
        if example.targets[0] == QUALITY[0]:  # a click on nothing
            assert right == 0
            assert len(example.target.labels) == 0
            continue
        assert right > 0.75  # a bin is 1.6 % of the input, and some objects are small
        unsure = np.append(quality_id(0.4), example.targets[1:])
        assert judge(example, said(unsure), SIZE).rewards[0] < right
    for example in found["outline"]:
        (right,) = judge(example, said(example.targets), SIZE).rewards
        outlined.append(right)
        cut = np.append(example.targets[: 2 * (len(example.targets) // 4)], EOS)
        assert judge(example, said(cut), SIZE).rewards[0] < right
        assert judge(example, said([EOS]), SIZE).rewards[0] == 0
    assert np.median(outlined) > 0.9
    for example in found["rate"]:
        assert judge(example, said(example.targets), SIZE).rewards[0] == 1
    assert min(map(len, found.values())) > 10


def test_answers_are_made_as_the_steps_are_asked(examples):
    task, found = examples
    pixels = np.zeros((64, 64, 3), np.uint8)
    image = EncodedImage(memory=None, pixels=pixels, input_size=SIZE)
    asked = {"find": task.requests(image, Clicks(((30.0, 30.0),), (True,)))}
    box = said([quality_id(0.9), 1010, 1010, 1050, 1050])
    asked["outline"] = task.follow_up(image, asked["find"], [box])
    ring = said([1010, 1010, 1010, 1050, 1050, 1050, EOS])
    asked["rate"] = task.follow_up(image, asked["outline"], [ring])
    for kind, requests in asked.items():
        assert task.generation_of(found[kind][0]) == requests[0].generation


@pytest.fixture(scope="module")
def rewards(shapes):
    model = untrained_predictor(shapes.categories, varied=True).model
    task = Prompted.from_model(model)
    own = Rewards(model, {"prompted": task}, {"prompted": shapes}, RewardConfig(num_samples=3), seed=0, bf16=False)
    own.samples = [TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(), seed=0)[0, i] for i in range(5)]
    return own


def test_recomputed_log_probabilities_are_the_sampled_ones(rewards):
    batch = collate(rewards.samples, ["prompted"], keep_samples=True)
    kinds = {rewards.tasks["prompted"].summary(e).split(",")[0] for s in batch.samples for e in s.examples["prompted"]}
    assert kinds == {"find", "outline", "rate"}
    compare_log_probabilities(rewards, batch, "prompted")


def test_a_model_of_clicks_is_tuned_by_its_config(rewards, folder, tmp_path):
    rewards.model.save_pretrained(tmp_path / "model")
    fixed = ["--objective", "reward", "--config", str(config_file("reward_clicks.yaml")), f"data={folder}"]
    settings = [f"init={tmp_path / 'model'}", f"out={tmp_path / 'run'}", *QUICK, "steps=2", "eval_images=0"]
    sizes = [f"prompted.{name}={getattr(CONFIG, name)}" for name in ("max_clicks", "max_points", "even_points")]
    assert main(["train", *fixed, *settings, *sizes, "prompted.short_points=6", "batch_size=2"]) == 0
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if line["kind"] == "train"]
    assert len(losses) == 2
    assert all(np.isfinite(losses))

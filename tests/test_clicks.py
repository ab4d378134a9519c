"""Clicks on objects: the simulated user, the language, the steps of an answer, training and the command line."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from click_model import CONFIG, SIZE, VOCAB, untrained_predictor
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from pix2seq import Predictor
from pix2seq.cli import main
from pix2seq.data.answers import read_answers
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.samples import TrainingSet
from pix2seq.data.shapes import write_shapes
from pix2seq.data.targets import transform_target
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.evaluation import evaluate
from pix2seq.geometry.affine import Affine
from pix2seq.geometry.boxes import box_iou_xyxy
from pix2seq.geometry.clicks import disturb, first_click, mask_iou, next_click
from pix2seq.geometry.polygons import rasterize
from pix2seq.metrics.clicks import Checked, ClickMetric, Trial
from pix2seq.model.decoding.generate import Completion
from pix2seq.model.decoding.grammar import RatedBoxGrammar
from pix2seq.rehearsal import record_answers
from pix2seq.tasks.lessons import recorded_lesson
from pix2seq.tasks.prompted import Exam, Prompted
from pix2seq.tasks.request import EncodedImage
from pix2seq.tokenizers.prompted import decode_found, decode_quality, find_prompt, outline_prompt, quality_id
from pix2seq.tokenizers.segmentation import encode_polygons
from pix2seq.types import Clicks, ImageRecord, ObjectMask, Target
from pix2seq.vocab import EOS, NEGATIVE, POSITIVE, QUALITY, SEPARATOR

masks = hnp.arrays(np.bool_, st.tuples(st.integers(2, 12), st.integers(2, 12)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("clicks") / "shapes"
    write_shapes(folder, num_train=12, num_val=4, size=64, seed=3, max_objects=4, workers=1)
    return folder


@pytest.fixture(scope="module")
def shapes(folder):
    return read_coco(folder, "train")


@pytest.fixture(scope="module")
def task(shapes):
    return Prompted(CONFIG, VOCAB, shapes.categories)


@pytest.fixture(scope="module")
def predictor(shapes):
    return untrained_predictor(shapes.categories)


@pytest.fixture(scope="module")
def checkpoint(predictor, tmp_path_factory):
    path = tmp_path_factory.mktemp("clicked") / "model"
    predictor.model.save_pretrained(path)
    return path


# The simulated user


def inner_distance(region):
    """Of every pixel to the nearest one outside, by comparing all pairs; pixels beyond the mask are outside."""
    padded = np.pad(region, 1)
    outside = np.argwhere(~padded)
    found = np.zeros(padded.shape)
    for y, x in np.argwhere(padded):
        found[y, x] = np.hypot(outside[:, 0] - y, outside[:, 1] - x).min()
    return found[1:-1, 1:-1]


@given(masks.filter(np.any), st.integers(0, 2**32))
def test_a_first_click_is_deep_inside_the_object(mask, seed):
    depths = inner_distance(mask)
    deepest, drawn = first_click(mask), first_click(mask, np.random.default_rng(seed))
    assert deepest.positive
    assert drawn.positive
    assert deepest.x % 1 == deepest.y % 1 == 0.5
    # OpenCV's distances are off by a few percent.
    assert depths[int(deepest.y), int(deepest.x)] >= 0.9 * depths.max()
    assert depths[int(drawn.y), int(drawn.x)] >= 0.45 * depths.max()


@given(st.data())
def test_a_next_click_is_on_the_deepest_mistake_and_says_what_it_is(data):
    truth = data.draw(masks)
    answer = data.draw(hnp.arrays(np.bool_, truth.shape))
    click = next_click(truth, answer)
    if (truth == answer).all():
        assert click is None
        return
    missing, extra = inner_distance(truth & ~answer), inner_distance(answer & ~truth)
    y, x = int(click.y), int(click.x)
    assert truth[y, x] == click.positive
    assert answer[y, x] != click.positive
    assert (missing if click.positive else extra)[y, x] >= 0.9 * max(missing.max(), extra.max())


def test_a_pixel_is_clicked_once_and_a_perfect_answer_never():
    truth = np.zeros((5, 5), bool)
    truth[1:4, 1:4] = True
    first = next_click(truth, np.zeros_like(truth))
    assert (first.x, first.y) == (2.5, 2.5)
    clicks = [first]
    while (click := next_click(truth, np.zeros_like(truth), clicks)) is not None:
        assert click not in clicks
        clicks.append(click)
    assert len(clicks) == 9
    assert next_click(truth, truth) is None


@given(masks.filter(np.any), st.floats(0, 1), st.integers(0, 2**32))
def test_a_disturbed_mask_has_the_same_shape_and_is_a_function_of_the_seed(mask, strength, seed):
    once, again = (disturb(mask, [~mask], strength, np.random.default_rng(seed)) for _ in range(2))
    assert once.shape == mask.shape
    assert once.dtype == np.bool_
    np.testing.assert_array_equal(once, again)


def test_stronger_mistakes_are_larger():
    truth = np.zeros((60, 60), bool)
    truth[15:45, 20:40] = True
    rng = np.random.default_rng(0)
    means = [np.mean([mask_iou(truth, disturb(truth, [], s, rng)) for _ in range(60)]) for s in (0.1, 0.5, 1.0)]
    assert means[0] > 0.85 > means[1] > means[2]


def test_iou_by_hand():
    one, other = np.zeros((2, 4), bool), np.zeros((2, 4), bool)
    one[0, :3] = other[0, 1:] = True
    assert mask_iou(one, other) == 0.5
    assert mask_iou(~one & one, one & ~one) == 1.0
    boxes = np.array([[0.0, 0, 2, 2], [1, 0, 3, 2], [5, 5, 5, 5]])
    np.testing.assert_allclose(box_iou_xyxy(boxes[:1], boxes), [[1, 1 / 3, 0]])


# The language


def test_the_prompts_are_as_documented():
    points, positive = np.array([[0.0, 1.0], [0.5, 0.25]]), np.array([True, False])
    base, bins = VOCAB.coord_base, VOCAB.num_bins - 1
    clicks = [base, base + bins, POSITIVE, base + 32, base + 16, NEGATIVE]
    ring = np.array([[0.0, 0.0], [0.0, 1.0], [1.0, 1.0]])
    ring_ids = [base, base, base, base + bins, base + bins, base + bins]
    box = np.array([0.0, 0.0, 1.0, 1.0])
    box_ids = [base, base, base + bins, base + bins]
    plain = find_prompt(14, points, positive, VOCAB, short_points=6)
    assert plain.tolist() == [14, *clicks]
    full = find_prompt(14, points, positive, VOCAB, box_yxyx=box, previous=[ring], short_points=6)
    assert full.tolist() == [14, *clicks, *box_ids, SEPARATOR, *ring_ids]
    outline = outline_prompt(14, points, positive, VOCAB, box_yxyx=box, previous=[ring], short_points=6)
    assert outline.tolist() == [14, *clicks, SEPARATOR, *ring_ids, SEPARATOR, *box_ids]


def test_a_quality_is_an_iou_in_tenths():
    assert [quality_id(v) for v in (-1, 0, 0.04, 0.06, 0.5, 1, 2)] == [46, 46, 46, 47, 51, 56, 56]
    assert [decode_quality(token) for token in (46, 51, 56, 45, 57)] == [0, 0.5, 1, 0, 0]
    quality, box = decode_found(np.array([56, 1000, 1021, 1042, 1063]), VOCAB)
    assert quality == 1
    np.testing.assert_allclose(box, [0, 1 / 3, 2 / 3, 1])


@given(st.integers(0, 2**32))
def test_the_grammar_gives_a_quality_and_a_box_with_area(seed):
    rng = np.random.default_rng(seed)
    grammar = RatedBoxGrammar(46, 56, VOCAB.coord_base, VOCAB.num_bins)
    ids = torch.zeros((3, 0), dtype=torch.int64)
    for _ in range(5):
        allowed = grammar.allowed(ids)
        assert (allowed.low < allowed.high).all()
        assert (allowed.singles == -1).all()
        drawn = torch.from_numpy(rng.integers(allowed.low.numpy(), allowed.high.numpy()))
        ids = torch.cat([ids, drawn[:, None]], dim=1)
    for row in ids.numpy():
        assert row[0] in QUALITY
        y0, x0, y1, x1 = row[1:] - VOCAB.coord_base
        assert 0 <= y0 < y1 < VOCAB.num_bins
        assert 0 <= x0 < x1 < VOCAB.num_bins


# Training


def samples_of(shapes, task, **augment):
    return TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(scale_min=0.9, scale_max=1.1, **augment), seed=0)


def test_sequences_fit_and_say_where_the_clicked_object_is(shapes, task):
    samples = samples_of(shapes, task)
    kinds = []
    for index in range(len(samples)):
        examples = samples[0, index].examples["prompted"]
        assert examples
        for example in examples:
            assert example.prompt[0] == 14
            assert len(example.prompt) + len(example.targets) <= task.max_seq_len
            kind = task.summary(example).split(",")[0]
            kinds.append(kind)
            assert (example.closeup is None) == (kind == "find")
            if kind == "find" and example.targets[0] == QUALITY[-1]:
                y0, x0, y1, x1 = VOCAB.coords(example.targets[1:])
                signs = np.flatnonzero(np.isin(example.prompt, [POSITIVE]))
                for at in signs[:1]:  # the first click lies on the object
                    y, x = VOCAB.coords(example.prompt[at - 2 : at])
                    assert y0 - 0.02 <= y <= y1 + 0.02
                    assert x0 - 0.02 <= x <= x1 + 0.02
    assert {"find", "outline", "rate"} == set(kinds)


def test_an_outline_is_the_object_in_the_frame_of_the_closeup(shapes):
    settings = {"part_share": 0.0, "group_share": 0.0, "background_share": 0.0, "box_share": 0.0, "max_objects": 9}
    task = Prompted(replace(CONFIG, even_points=40, max_points=60, **settings), VOCAB, shapes.categories)
    samples = TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(enabled=False), seed=0)
    compared = 0
    for index in range(len(samples)):
        target = shapes.target(index)
        truths = [rasterize(rings, *SIZE) for rings in target.segmentations]
        for example in samples[0, index].examples["prompted"]:
            if not task.summary(example).startswith("outline"):
                continue
            (mask,) = task.shown(example, SIZE)
            drawn = rasterize(mask.polygons, *SIZE)
            assert max(mask_iou(drawn, truth) for truth in truths) > 0.75
            compared += 1
    assert compared > 15


def test_a_rated_outline_gets_its_iou(shapes):
    task = Prompted(replace(CONFIG, rate_share=1.0, part_share=0.0, group_share=0.0), VOCAB, shapes.categories)
    samples = TrainingSet(shapes, task, size=SIZE, augment=AugmentConfig(enabled=False), seed=0)
    differences = []
    for index in range(len(samples)):
        truths = [rasterize(rings, *SIZE) for rings in shapes.target(index).segmentations]
        for example in samples[0, index].examples["prompted"]:
            if not task.summary(example).startswith("rate"):
                continue
            said = decode_quality(int(example.targets[0]))
            assert example.prompt[-1] == EOS
            outline = replace(example, targets=example.prompt[outline_start(example.prompt) :])
            shown = task.shown(outline, SIZE)
            drawn = rasterize(shown[0].polygons if shown else [], *SIZE)
            differences.append(min(abs(mask_iou(drawn, truth) - said) for truth in truths))
    assert len(differences) > 15
    assert np.median(differences) < 0.05  # tenths, and an outline of 12 points


def outline_start(prompt):
    """Where the rated outline begins: after the last box that follows a separator and is followed by an outline."""
    for at in np.flatnonzero(prompt == SEPARATOR)[::-1]:
        rest = prompt[at + 1 : -1]
        if not (rest == SEPARATOR).any() and len(rest) >= 4:
            return at + 5
    raise AssertionError(prompt)


def test_samples_are_a_function_of_seed_epoch_and_index(shapes, task):
    samples = samples_of(shapes, task)
    for key in ((0, 3), (1, 3)):
        once, again = samples[key].examples["prompted"], samples_of(shapes, task)[key].examples["prompted"]
        assert len(once) == len(again)
        for one, other in zip(once, again, strict=True):
            np.testing.assert_array_equal(one.prompt, other.prompt)
            np.testing.assert_array_equal(one.targets, other.targets)
    texts = [[example.prompt.tolist() for example in samples[epoch, 3].examples["prompted"]] for epoch in (0, 1)]
    assert texts[0] != texts[1]


def test_boxes_alone_are_learned_from_data_without_masks(shapes, task):
    target = replace(shapes.target(0), segmentations=(None,) * len(shapes.target(0).labels))
    examples = task.examples(transform_target(target, Affine(1, 1), SIZE), SIZE, np.random.default_rng(0))
    assert examples
    assert all(task.summary(example).startswith("find") for example in examples)


@given(
    st.floats(0.2, 3),
    st.floats(-50, 50),
    st.floats(-50, 50),
    st.booleans(),
    hnp.arrays(np.float64, (5, 2), elements=st.floats(0, 60)),
)
def test_a_target_knows_how_the_image_was_moved(scale, dx, dy, mirror, points):
    empty = np.zeros((0, 4), np.float32)
    record = ImageRecord(1, "a.png", 60, 60)
    none = np.zeros(0, np.int64)
    target = Target(record, empty, none, none, none.astype(bool), none, (), np.zeros((0, 0, 3), np.float32))
    first, second = Affine(scale, scale, dx, dy), Affine(1.5, 0.5, 3, -4)
    if mirror:
        first = first.then_mirror(60)
    moved = transform_target(transform_target(target, first, SIZE), second, SIZE)
    np.testing.assert_allclose(
        points * moved.scale_xy + moved.offset_xy, second.points(first.points(points)), atol=1e-2
    )


# Asking and answering


def say(ids):
    tokens = np.atleast_2d(np.array(ids, np.int64))
    zeros = np.zeros(tokens.shape, np.float32)
    return Completion(tokens, zeros, None, None, np.zeros(len(tokens), bool))


def image_of(width=128, height=64):
    return EncodedImage(torch.zeros(1, 1), np.zeros((height, width, 3), np.uint8), SIZE)


def found_ids(quality, box_xyxy, frame):
    return [quality_id(quality), *VOCAB.coord_ids(frame.to_input_yxyx(np.array([box_xyxy], np.float64))[0])]


def outline_ids(ring_xy, frame):
    return [*encode_polygons([frame.to_input_yx(np.array(ring_xy, np.float64))], VOCAB), EOS]


def test_clicks_are_answered_in_three_steps_in_pixels_of_the_image(task):
    image = image_of()
    clicks = Clicks(((60.0, 30.0), (20.0, 10.0)), (True, False))
    (find,) = task.requests(image, task.check_about(image, clicks))
    assert find.closeup is None
    assert find.num_samples == 4
    y, x = find.prompt[1:3] - VOCAB.coord_base
    assert (x, y) == (round(60 / 128 * 63), round(30 / 128 * 63))  # the input shows 128 x 128, padding included
    boxes = [(40, 20, 80, 50), (41, 21, 80, 50), (40, 20, 80, 51), (100, 0, 120, 20)]
    said = [say([found_ids(0.8, box, image.frame()) for box in boxes])]
    outlines = task.follow_up(image, [find], said)
    assert [len(outlines)] == [2]  # three samples mean one object
    near = outlines[0].closeup
    x0, y0, x1, y1 = near.xyxy
    assert x0 < 40
    assert y0 < 20
    assert x1 > 80
    assert y1 > 51
    assert x1 - x0 == pytest.approx(40 * 1.5, rel=0.1)
    point = near.to_image_xy(VOCAB.coords(outlines[0].prompt[1:3]).reshape(1, 2))[0]
    np.testing.assert_allclose(point, [60, 30], atol=1)
    squares = [[(45, 25), (75, 25), (75, 45), (45, 45)], [(102, 2), (118, 2), (118, 18), (102, 18)]]
    drawn = [say([outline_ids(ring, each.closeup)]) for ring, each in zip(squares, outlines, strict=True)]
    rates = task.follow_up(image, outlines, drawn)
    assert [each.generation.max_new_tokens for each in rates] == [1, 1]
    assert rates[0].prompt[-1] == EOS
    ratings = [say([[quality_id(0.4)]]), say([[quality_id(0.9)]])]
    assert task.follow_up(image, rates, ratings) == []
    best, other = task.answers(image, rates, ratings)
    assert (best.score, other.score) == (0.9, 0.4)
    np.testing.assert_allclose(best.box_xyxy, [102, 2, 118, 18], atol=0.5)
    assert mask_iou(rasterize(other.polygons, 64, 128), rasterize([np.array(squares[0])], 64, 128)) > 0.9


def test_no_more_candidates_than_asked_for_and_one_after_an_answer(task):
    image = image_of(64, 64)
    boxes = [(0, 0, 10, 10), (20, 20, 40, 40), (30, 0, 60, 18), (0, 40, 20, 60)]

    def candidates(clicks):
        (find,) = task.requests(image, clicks)
        return len(task.follow_up(image, [find], [say([found_ids(1, box, image.frame()) for box in boxes])]))

    clicks = Clicks(((5.0, 5.0),), (True,))
    ring = np.array([[0, 0], [10, 0], [10, 10]], np.float32)
    assert candidates(clicks) == CONFIG.num_candidates == 3
    assert candidates(replace(clicks, num_candidates=2)) == 2
    assert candidates(replace(clicks, previous=(ring,))) == 1


def test_the_grid_keeps_what_several_clicks_agree_on(task):
    image = image_of(64, 64)
    finds = task.requests(image, None)
    assert len(finds) == 9
    assert {each.num_samples for each in finds} == {1}
    square, lonely, nothing = (2, 2, 40, 40), (44, 44, 60, 60), (0, 0, 30, 60)
    boxes = [square, square, lonely, square, square, lonely, nothing, nothing, lonely]
    qualities = [1, 1, 1, 1, 1, 0.2, 0.3, 0.3, 0.1]
    said = [say([found_ids(q, box, image.frame())]) for q, box in zip(qualities, boxes, strict=True)]
    (outline,) = task.follow_up(image, finds, said)
    np.testing.assert_allclose(outline.subject.mask.box_xyxy, square, atol=1)
    assert outline.subject.clicks.points in [((x, y),) for x in (64 / 6, 32) for y in (64 / 6, 32)]
    none = [say([found_ids(0, box, image.frame())]) for box in boxes]
    assert task.follow_up(image, finds, none) == []
    assert task.answers(image, finds, none) == []


def test_of_masks_that_overlap_the_best_is_kept(task):
    def square(x, score):
        ring = np.array([[x, 0], [x + 20, 0], [x + 20, 20], [x, 20]], np.float32)
        return ObjectMask((x, 0.0, x + 20.0, 20.0), [ring], score)

    first, shifted, other, poor = square(0, 0.9), square(2, 0.8), square(30, 0.7), square(30, 0.1)
    assert task._suppressed(image_of(64, 64), [first, shifted, other, poor]) == [first, other]


def test_an_exam_clicks_until_an_answer_is_good_and_keeps_each_iou(task, monkeypatch):
    image = image_of(64, 64)
    truth = np.array([[10, 10], [40, 10], [40, 40], [10, 40]], np.float64)
    half = np.array([[10, 10], [25, 10], [25, 40], [10, 40]], np.float64)
    requests = task.requests(image, Exam(((truth,),), (7,), 6, with_grid=False))
    answers = [half, half, truth]
    rounds = 0
    while requests:
        (request,) = requests
        assert len(request.subject.clicks.points) == min(rounds, 5) + 1
        assert bool(request.subject.clicks.previous) == (rounds > 0)
        found = [say([found_ids(1, (10, 10, 40, 40), image.frame())] * 4)]
        outlines = task.follow_up(image, requests, found)
        ring = answers[min(rounds, 2)]
        rates = task.follow_up(image, outlines, [say([outline_ids(ring, outlines[0].closeup)])])
        last = (rates, [say([[quality_id(0.7)]])])
        requests = task.follow_up(image, *last)
        rounds += 1
    (checked,) = task.answers(image, *last)
    (trial,) = checked.trials
    assert trial.annotation_id == 7
    assert len(trial.clicks) == len(trial.ious) == len(trial.outlines) == rounds
    np.testing.assert_allclose(trial.ious[:3], [0.5, 0.5, 1.0], atol=0.07)
    assert (trial.clicks[0].x, trial.clicks[0].y) == (24.5, 24.5)
    assert trial.clicks[1].positive
    assert trial.clicks[1].x > 25
    (record,) = task.records([checked])
    assert json.loads(json.dumps(record))["ious"][0] == pytest.approx(trial.ious[0], abs=1e-4)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3,4", Clicks(((3.0, 4.0),), (True,))),
        ("3,4,+; 5.5,6,-", Clicks(((3.0, 4.0), (5.5, 6.0)), (True, False))),
        ("1,2,30,40", Clicks((), (), (1.0, 2.0, 30.0, 40.0))),
    ],
)
def test_clicks_are_read_from_text(task, text, expected):
    assert task.parse_about(text) == expected


@pytest.mark.parametrize("text", ["3", "3,4,?", "a,b", "1,2,3,4,5"])
def test_other_text_is_refused(task, text):
    with pytest.raises(InputError, match="cannot be read; expected clicks"):
        task.parse_about(text)


@pytest.mark.parametrize(
    ("points", "options", "message"),
    [
        ([(1, 1)], {"labels": [2]}, "label of 0 or 1"),
        ([(1, 1)], {"labels": [1, 0]}, r"shapes \(1, 2\) and \(2,\)"),
        ([(1, 1, 1)], {}, r"must be \(N, 2\)"),
        (["a"], {}, "must be numbers"),
        ([(65, 1)], {}, "inside the image of 64 x 48"),
        ([(float("nan"), 1)], {}, "inside the image"),
        ([], {}, "no click and no box"),
        ([(1, 1)] * 7, {}, "7 clicks were given, but the model reads at most 6"),
        ([], {"box": [5, 5, 5, 9]}, "x1 > x0"),
        ([], {"box": [5, 5, 9]}, "x0, y0, x1, y1"),
        ([(1, 1)], {"num_candidates": 0}, "at least 1"),
    ],
)
def test_bad_clicks_end_in_a_line(predictor, points, options, message):
    image = predictor.encode(np.zeros((48, 64, 3), np.uint8))
    with pytest.raises(InputError, match=message):
        predictor.click(image, points, **options)


def test_an_answer_is_rated_on_the_closeup_that_it_was_read_from(predictor, shapes, monkeypatch):
    image = predictor.encode(shapes.target(0).image.path)
    made = []
    look_closer = predictor._look_closer
    monkeypatch.setattr(predictor, "_look_closer", lambda asked: made.extend(asked) or look_closer(asked))
    exchange = predictor._ask("prompted", [image], [Clicks(((30.0, 30.0),), (True,))], seed=0)[0]
    read = [request.closeup.xyxy.tolist() for request in exchange.requests if request.closeup is not None]
    distinct = {tuple(frame) for frame in read}
    assert len(read) == 2 * len(distinct) > 0  # an outline and a rating each
    assert len(made) == len(distinct)


def test_what_is_not_clicks_is_refused(predictor):
    with pytest.raises(InputError, match="asked about Clicks, got list"):
        predictor.ask("prompted", [np.zeros((48, 64, 3), np.uint8)], [[(1, 1)]])


def test_an_answer_depends_on_nothing_else_that_is_asked(predictor, shapes):
    images = [predictor.encode(shapes.images[i].path) for i in range(3)]
    clicks = [Clicks(((20.0, 20.0 + i),), (True,)) for i in range(3)]
    together = predictor.ask("prompted", images, clicks, seed=5)
    for image, asked, answers in zip(images, clicks, together, strict=True):
        alone = predictor.ask("prompted", [image], [asked], seed=5)[0]
        assert [mask.to_json() for mask in alone] == [mask.to_json() for mask in answers]
    assert predictor.ask("prompted", [], []) == []


def test_masks_lie_inside_the_image_whatever_is_answered(predictor):
    image = predictor.encode(np.random.default_rng(0).integers(0, 255, (48, 100, 3), np.uint8))
    clicked = predictor.click(image, [(50, 20)])
    assert clicked
    for masks in (clicked, predictor.everything(image)):
        for mask in masks:
            points = np.concatenate(mask.polygons)
            assert (points >= 0).all()
            assert (points <= [100, 48]).all()
            assert 0 <= mask.score <= 1


def test_a_session_goes_on_from_the_answer_and_back(predictor, shapes):
    image = predictor.encode(shapes.images[0].path)
    session = predictor.session(image, seed=3)
    assert session.mask is None
    assert session.candidates == []
    assert session.undo() == []
    first = session.add(30, 30)
    assert [m.to_json() for m in first] == [m.to_json() for m in predictor.click(image, [(30, 30)], seed=3)]
    if first:
        chosen = session.choose(len(first) - 1)
        second = session.add(10, 12, positive=False)
        again = predictor.click(image, [(30, 30), (10, 12)], [1, 0], previous=chosen, seed=3)
        assert [m.to_json() for m in second] == [m.to_json() for m in again]
        assert session.undo() == first
        assert session.mask is chosen
    with pytest.raises(InputError, match="no candidate 9"):
        session.choose(9)
    session.reset()
    assert session.mask is None


# Measuring


def test_the_metric_by_hand():
    metric, other = ClickMetric(12), ClickMetric(12)
    truth = np.ones((2, 2), bool)

    def add(to, *ious, scores=None, best=None):
        trial = Trial(1, truth, (), ious, scores or ious, (best or ious[0],))
        to.add(target_of(), [Checked((trial,), ())])

    add(metric, 0.5, 0.7, 0.86, 0.91)
    add(metric, 0.95)
    add(other, 0.2, 0.2, 0.2, best=0.6)
    metric.merge(other)
    found = metric.result().metrics
    assert found["mIoU@1"] == pytest.approx((0.5 + 0.95 + 0.2) / 3)
    assert found["mIoU@3"] == pytest.approx((0.86 + 0.95 + 0.2) / 3)
    assert found["mIoU@8"] == pytest.approx((0.91 + 0.95 + 0.2) / 3)
    assert found["best_mIoU@1"] == pytest.approx((0.5 + 0.95 + 0.6) / 3)
    assert found["NoC85"] == pytest.approx((3 + 1 + 12) / 3)
    assert found["NoC90"] == pytest.approx((4 + 1 + 12) / 3)
    assert found["never85"] == pytest.approx(1 / 3)
    assert found["score_correlation"] == pytest.approx(1)
    assert ClickMetric(12).result().metrics["mIoU@1"] is None


def target_of(*rings):
    boxes = np.array([[*ring.min(0), *ring.max(0)] for ring in rings], np.float32).reshape(-1, 4)
    number = len(rings)
    return Target(
        ImageRecord(1, "a.png", 64, 64),
        boxes,
        np.arange(1, number + 1),
        (boxes[:, 2:] - boxes[:, :2]).prod(1),
        np.zeros(number, bool),
        np.arange(1, number + 1),
        tuple([ring] for ring in rings),
        np.zeros((number, 0, 3), np.float32),
    )


def test_everything_is_recalled_whatever_its_class():
    one = np.array([[0, 0], [20, 0], [20, 20], [0, 20]], np.float32)
    metric = ClickMetric(12)
    masks = tuple(ObjectMask((0.0, 0.0, 20.0, 20.0), [ring], 0.5) for ring in (one, one + 3))
    metric.add(target_of(one, one + 30), [Checked((), masks)])
    found = metric.result().metrics
    assert found["AR@10"] == found["AR@100"] == pytest.approx(0.5)


def test_evaluation_names_all_numbers_and_times_a_click(predictor, folder):
    result = evaluate(predictor, read_coco(folder, "val"), ["prompted"], limit=2)
    names = {
        f"prompted/{name}" for name in ("mIoU@1", "mIoU@3", "mIoU@5", "mIoU@8", "NoC85", "NoC90", "AR@10", "AR@100")
    }
    assert names <= set(result.metrics)
    assert 0 < result.metrics["prompted/ms_per_click"] < 60_000


# The model's own answers


def test_recorded_answers_are_learned_from_in_the_frame_of_the_sample(predictor, shapes, folder, tmp_path):
    path = record_answers(predictor, shapes, "prompted", tmp_path, seed=1)
    assert path == record_answers(predictor, shapes, "prompted", tmp_path, batch_size=5, seed=1)
    records = {record["annotation_id"]: record for record in read_answers(path)}
    assert set(records) <= {number for i in range(len(shapes)) for number in shapes.target(i).annotation_ids.tolist()}
    config = replace(CONFIG, answers=str(path), answer_share=1.0, box_share=0.0, background_share=0.0, max_objects=9)
    samples = samples_of(shapes, Prompted(config, VOCAB, shapes.categories), flip=1.0)
    for index in range(len(samples)):
        target = shapes.target(index)
        allowed = [
            (np.array(click[:2]), iou, click[2])
            for number in target.annotation_ids.tolist()
            for click, iou in zip(records[number]["clicks"], records[number]["ious"], strict=True)
        ]
        sample = samples[0, index]
        moved = moved_target(samples, index)
        for example in sample.examples["prompted"]:
            if not samples.task.summary(example).startswith("find"):
                continue
            signs = np.flatnonzero(np.isin(example.prompt, [POSITIVE, NEGATIVE]))
            end = signs[-1]
            if len(signs) == 1:
                assert SEPARATOR not in example.prompt  # there was no answer before
            y, x = VOCAB.coords(example.prompt[end - 2 : end])
            near = [
                abs(np.array([x, y]) * 64 - (point * moved.scale_xy + moved.offset_xy)).max() < 1.1
                and example.targets[0] == quality_id(iou)
                and (example.prompt[end] == POSITIVE) == bool(positive)
                for point, iou, positive in allowed
            ]
            assert any(near)


def test_a_recorded_lesson_has_the_answer_before_the_click_and_the_one_after_it():
    ring = np.array([[0.0, 0.0], [8, 0], [8, 8]])
    record = {
        "clicks": [[10, 20, 1], [30, 20, 0], [12, 22, 1]],
        "outlines": [[ring.tolist()], [(ring + 1).tolist()], [(ring + 2).tolist()]],
        "ious": [0.3, 0.6, 0.9],
    }
    target = replace(target_of(ring.astype(np.float32)), scale_xy=(-1.0, 2.0), offset_xy=(64.0, 3.0))
    seen = set()
    for seed in range(20):
        lesson = recorded_lesson(record, [ring], target, SIZE, np.random.default_rng(seed))
        number = len(lesson.points_xy)
        seen.add(number)
        np.testing.assert_allclose(lesson.points_xy, np.array([[54, 43], [34, 43], [52, 47]])[:number])
        assert lesson.positive.tolist() == [True, False, True][:number]
        assert lesson.quality == lesson.answer_quality == record["ious"][number - 1]
        assert len(lesson.previous) == (number > 1)
        for rings, after in ((lesson.previous, number - 1), (lesson.answer, number)):
            for each in rings:
                np.testing.assert_allclose(each, (ring + after - 1) * [-1, 2] + [64, 3])
    assert seen == {1, 2, 3}
    far = replace(target, offset_xy=(64.0, 40.0))  # y = 80 lies outside
    assert recorded_lesson(record, [ring], far, SIZE, np.random.default_rng(0)) is None


def moved_target(samples, index):
    """The target of sample (0, index), caught on its way to the task."""
    caught = []
    original = samples.task.examples

    def catch(target, size, rng):
        caught.append(target)
        return original(target, size, rng)

    samples.task.examples = catch
    try:
        samples[0, index]
    finally:
        del samples.task.examples
    return caught[0]


def test_a_changed_file_of_answers_is_refused(predictor, shapes, tmp_path):
    path = record_answers(predictor, shapes, "prompted", tmp_path, limit=2)
    path.write_text(path.read_text("utf-8").replace("1", "2", 1), "utf-8")
    with pytest.raises(InputError, match="was changed or renamed"):
        read_answers(path)
    with pytest.raises(InputError, match="cannot be read"):
        read_answers(tmp_path / "answers-0.jsonl")


# The command line


def test_predict_takes_points_and_finds_everything_without(checkpoint, folder, tmp_path, capsys):
    image = next((folder / "val2017").iterdir())
    common = ["predict", str(image), "--checkpoint", str(checkpoint), "--task", "prompted"]
    assert main([*common, "--out", str(tmp_path / "a"), "--points", "30,30", "10,12,-"]) == 0
    predictor = Predictor.from_pretrained(checkpoint)
    expected = predictor.click(image, [(30, 30), (10, 12)], [1, 0])
    content = json.loads((tmp_path / "a" / f"{image.stem}.json").read_text("utf-8"))
    assert content["prompted"] == [mask.to_json() for mask in expected]
    assert Image.open(tmp_path / "a" / f"{image.stem}.png").size
    assert main([*common, "--out", str(tmp_path / "b")]) == 0
    everything = json.loads((tmp_path / "b" / f"{image.stem}.json").read_text("utf-8"))["prompted"]
    assert everything == [mask.to_json() for mask in predictor.everything(image)]
    assert main([*common, "--out", str(tmp_path / "c"), "--points", "1,1", "--about", "1,1"]) == 2
    assert "--points is a form of --about" in capsys.readouterr().err


def test_a_world_has_only_the_classes_asked_for(tmp_path, capsys):
    command = ["data", "shapes", str(tmp_path / "some"), "--train", "0", "--val", "6", "--size", "48", "--workers", "1"]
    assert main([*command, "--classes", "heart,moon"]) == 0
    dataset = read_coco(tmp_path / "some", "val")
    names = {c.label: c.name for c in dataset.categories}
    assert {names[label] for label in dataset.annotations.labels.tolist()} == {"heart", "moon"}
    command[2] = str(tmp_path / "none")
    assert main([*command, "--classes", "hart"]) == 2
    assert "unknown class 'hart'; did you mean 'heart'" in capsys.readouterr().err


SMALL = [
    *("tasks=[prompted]", "steps=4", "batch_size=4", "checkpoint_every=2", "num_workers=0", "device=cpu", "bf16=false"),
    *("model.image_size=[64,64]", "model.encoder.name=vit", "model.encoder.dim=32", "model.encoder.num_layers=1"),
    *(
        "model.encoder.num_heads=2",
        "model.encoder.mlp_dim=64",
        "model.encoder.stem=conv",
        "model.encoder.closeups=true",
    ),
    *("model.decoder.dim=32", "model.decoder.num_layers=1", "model.decoder.num_heads=2", "model.decoder.mlp_dim=64"),
    *(
        "model.decoder.max_seq_len=100",
        "model.vocab.num_bins=64",
        "model.vocab.size=1100",
        "model.vocab.text_base=1100",
    ),
    *("prompted.max_points=24", "prompted.even_points=12", "prompted.short_points=6", "prompted.max_clicks=2"),
    *("prompted.grid=2", "eval_images=1", "trackers=[]"),
]


def test_a_run_that_learns_from_answers_resumes_to_the_same_weights(predictor, shapes, folder, tmp_path, capsys):
    answers = record_answers(predictor, shapes, "prompted", tmp_path, seed=1)
    settings = [*SMALL, f"data={folder}", f"prompted.answers={answers}"]
    assert main(["train", f"out={tmp_path / 'whole'}", *settings]) == 0
    assert main(["train", f"out={tmp_path / 'parts'}", *settings, "steps=2"]) == 0
    assert main(["train", f"out={tmp_path / 'parts'}", *settings, "--resume", "auto"]) == 0
    whole, parts = (
        tmp_path / name / "checkpoints" / "step-00000004" / "model.safetensors" for name in ("whole", "parts")
    )
    assert whole.read_bytes() == parts.read_bytes()
    capsys.readouterr()
    assert main(["train", f"out={tmp_path / 'parts'}", *settings[:-1], "steps=6", "--resume", "auto"]) == 2
    assert "prompted.answers" in capsys.readouterr().err


def test_answers_are_recorded_from_the_command_line(checkpoint, folder, tmp_path, capsys):
    common = ["data", "answers", str(folder), str(tmp_path), "--checkpoint", str(checkpoint), "--limit", "2"]
    assert main([*common, "--task", "prompted"]) == 0
    path = next(tmp_path.glob("answers-*.jsonl"))
    assert capsys.readouterr().out.strip() == str(path)
    assert read_answers(path)

"""What each task asks, and how it reads, scores, draws and writes what a model says; worked by hand."""

import math

import numpy as np
import pytest
import torch
from pycocotools import mask as mask_utils

from pix2seq.drawing import Canvas
from pix2seq.errors import InputError
from pix2seq.metrics.captions import CaptionMetric
from pix2seq.model.decoding.generate import Completion
from pix2seq.tasks import get_task
from pix2seq.tasks.objects import Boxes, token_score, weighted_score
from pix2seq.tasks.request import EncodedImage
from pix2seq.tokenizers.text import WordTokenizer
from pix2seq.types import Caption, Category, ImageRecord, Instance, Target
from pix2seq.vocab import EOS, INVISIBLE, NOISE, SEPARATOR, Vocab

TEXT = WordTokenizer.build(["a cat sits"])
VOCAB = Vocab(num_bins=101, text_base=1200, size=1200).with_text(TEXT.size)
KITE, PERSON = Category(2, 8, "kite"), Category(5, 9, "Person", ("nose", "tail"))
# 100 pixels wide and 50 high, on a canvas 100 x 200: the image fills the upper half, at twice its size.
IMAGE = EncodedImage(torch.zeros(1, 1), np.zeros((50, 100, 3), np.uint8), (200, 200))


def task_of(name, **settings):
    task_type = get_task(name)
    return task_type(task_type.config_type(**settings), VOCAB, (KITE, PERSON), TEXT)


def said(tokens, *, probs=None, best=None, best_probs=None, cut=False):
    """A completion of one row or several, of tokens with probabilities."""
    tokens = np.atleast_2d(np.array(tokens))
    log = lambda values: np.log(np.full(tokens.shape, 1.0) if values is None else np.atleast_2d(values))  # noqa: E731
    return Completion(
        tokens, log(probs), tokens if best is None else np.atleast_2d(best), log(best_probs), np.full(len(tokens), cut)
    )


def instance(box=(10, 10, 30, 30), category=PERSON, score=0.5, **more):
    return Instance(box, category, score, **more)


def bins(*values):
    return [1000 + value for value in values]


# Detection


def test_detected_objects_are_in_pixels_of_the_image_best_first():
    task = task_of("detection")
    tokens = [
        *bins(10, 20, 30, 40),
        NOISE,
        *bins(0, 0, 50, 100),
        105,
        *bins(60, 0, 90, 100),
        102,
        *bins(5, 5, 5, 9),
        102,
    ]
    best = [0, 0, 0, 0, 102, 0, 0, 0, 0, 105, 0, 0, 0, 0, 102, 0, 0, 0, 0, 102]
    probs = np.full(20, 0.5)
    probs[[4, 9, 14, 19]] = [0.25, 0.75, 0.9, 0.9]
    first, second = task.answers(IMAGE, task.requests(IMAGE, None), [said(tokens, best=best, best_probs=probs)])
    # A bin is two pixels of the canvas, and one of the image.
    assert first.box_xyxy == pytest.approx((0, 0, 100, 50))
    assert (first.category, first.score) == (PERSON, pytest.approx(0.75))
    assert second.box_xyxy == pytest.approx((20, 10, 40, 30))
    assert (second.category, second.score) == (KITE, pytest.approx(0.25))  # the third lies in the padding
    unknown = said(bins(0, 0, 50, 50) + [NOISE], best=[0, 0, 0, 0, 103])
    assert task.answers(IMAGE, [], [unknown]) == []
    assert task.answers(IMAGE, [], [said([EOS])]) == []
    beyond = said(bins(40, 90, 70, 100) + [105])
    assert task.answers(IMAGE, [], [beyond])[0].box_xyxy == pytest.approx((90, 40, 100, 50))


def test_detection_asks_for_a_list_that_ends_if_it_learned_an_end():
    (request,) = task_of("detection", max_objects=7, top_p=0.3, top_k=5, temperature=0.7).requests(IMAGE, None)
    config = request.generation
    assert request.prompt.tolist() == [10]
    assert (request.num_samples, request.region, request.length) == (1, None, 35)
    assert (config.max_new_tokens, config.eos_id, config.with_logprobs) == (35, None, False)
    assert (config.top_p, config.top_k, config.temperature) == (0.3, 5, 0.7)
    assert config.score_range == (101, 106)  # labels 1 to 5
    assert [step for step in range(11) if config.is_scored(step)] == [4, 9]
    ended = task_of("detection", max_objects=7, noise_objects=0).generation()
    assert (ended.max_new_tokens, ended.eos_id, ended.grammar.eos_id) == (35, EOS, EOS)
    asked = task_of("detection", max_objects=7, noise_objects=0, num_objects=3).generation()
    assert (asked.max_new_tokens, asked.eos_id, asked.grammar.eos_id) == (15, None, None)


@pytest.mark.parametrize(
    ("name", "before", "allowed"),
    [
        ("detection", [], {EOS, *range(1000, 1100)}),
        ("detection", bins(3), set(range(1000, 1100))),
        ("detection", bins(3, 5), set(range(1004, 1101))),
        ("detection", bins(3, 5, 9), set(range(1006, 1101))),
        ("detection", bins(3, 5, 9, 9), {NOISE, *range(101, 106)}),
        ("segmentation", [], set(range(1000, 1101))),
        ("segmentation", bins(1, 1, 2, 2, 3, 3), {EOS, SEPARATOR, *range(1000, 1101)}),
        ("segmentation", [*bins(1, 1, 2, 2, 3, 3), SEPARATOR], {SEPARATOR}),
        ("keypoint", [], {INVISIBLE, *range(1000, 1101)}),
        ("keypoint", [INVISIBLE], {INVISIBLE}),
        ("keypoint", bins(4), set(range(1000, 1101))),
        ("captioning", [], {1200 + i for i in range(3, TEXT.size)}),
        ("captioning", [1203], {1201, *(1200 + i for i in range(3, TEXT.size))}),
        ("captioning", [1203] * 5, {1201}),
    ],
)
def test_grammars_allow_these_ids_after_those(name, before, allowed):
    settings = {"detection": {"noise_objects": 0}, "captioning": {"max_tokens": 6}}
    grammar = task_of(name, **settings.get(name, {})).grammar()
    forbidden = grammar.allowed(torch.tensor([before], dtype=torch.int64)).forbids(torch.arange(VOCAB.size))
    assert set(torch.nonzero(~forbidden[0]).ravel().tolist()) == allowed


def test_a_full_list_says_how_to_ask_for_more():
    assert "7 objects: ask for more with --num-objects" in task_of("detection", max_objects=7).cut_hint(35)
    assert (
        task_of("segmentation").cut_hint(9) == "this checkpoint's segmentation.max_points ends answers after 9 tokens"
    )
    assert "captioning.max_tokens" in task_of("captioning").cut_hint(9)
    assert "the number of keypoints" in task_of("keypoint").cut_hint(9)


# Masks


def test_the_score_of_a_mask_is_weighed_with_that_of_its_box():
    tokens = [*bins(0, 0, 0, 40, 20, 40), EOS]
    other = [*bins(0, 0, 0, 40), EOS, EOS, EOS]  # padding does not count
    out = said([tokens, other], probs=[[0.8] * 7, [0.4] * 4 + [0.1] * 3])
    for weight, expected in ((0.0, 0.5), (0.25, 0.25 * 0.6 + 0.75 * 0.5), (1.0, 0.6)):
        task = task_of("segmentation", score_weight=weight, num_samples=2)
        (answer,) = task.answers(IMAGE, task.requests(IMAGE, [instance()]), [out])
        assert answer.score == pytest.approx(expected)
        assert answer.mask_score == pytest.approx((0.8 + 0.4) / 2)
        assert answer.box_xyxy == (10, 10, 30, 30)


def test_a_mask_is_asked_for_in_the_frame_of_its_input():
    task = task_of("segmentation", max_points=20, num_samples=3, top_p=0.5)
    (request,) = task.requests(IMAGE, [instance()])
    frame = IMAGE.frame(request.region)
    assert request.prompt[0] == 11
    np.testing.assert_allclose(
        (request.prompt[1:5] - 1000) / 100, frame.to_input_yxyx(np.array([[10, 10, 30, 30]]))[0], atol=0.0051
    )
    assert request.prompt[5] == 105
    assert (request.num_samples, request.subject) == (3, instance())
    config = request.generation
    assert (config.max_new_tokens, config.eos_id, config.top_p, config.grammar.max_points) == (41, EOS, 0.5, 20)
    assert 0 <= request.length <= 41
    lengths = [task.requests(IMAGE, [instance((0, 0, side, side / 2))])[0].length for side in (10, 40, 100)]
    assert lengths == sorted(lengths)  # longer answers are expected of larger objects


def test_votes_reach_the_border_of_the_image():
    task = task_of("segmentation", num_samples=2, threshold=1.0)
    tokens = [*bins(0, 0, 0, 100, 100, 100, 100, 0), EOS]
    frame = IMAGE.frame()
    rings, rle = task.mask(np.array([tokens, tokens]), frame, (100, 50))
    assert mask_utils.decode(rle).shape == (50, 100)
    assert mask_utils.decode(rle).all()
    ((ring,),) = [rings]
    assert sorted(map(tuple, ring.tolist())) == [(0, 0), (0, 50), (100, 0), (100, 50)]
    inner = [*bins(10, 20, 10, 60, 30, 60, 30, 20), EOS]
    rings, rle = task.mask(np.array([inner, inner]), frame, (100, 50))
    ys, xs = np.nonzero(mask_utils.decode(rle))
    assert (xs.min(), ys.min(), xs.max(), ys.max()) == (20, 10, 59, 29)
    assert len(xs) == 40 * 20
    assert [rings[0].min(0).tolist(), rings[0].max(0).tolist()] == [[20, 10], [60, 30]]
    assert task.mask(np.array([[EOS], [EOS]]), frame, (100, 50)) == ([], None)
    one, none = task.mask(np.array([tokens]), frame, (100, 50))
    assert none is None
    assert one[0].dtype == np.float32
    assert one[0].max(0).tolist() == [100, 50]


@pytest.mark.parametrize(
    ("threshold", "pixels"), [(0.3, 30), (1 / 3, 30), (0.34, 20), (2 / 3, 20), (0.7, 10), (1.0, 10)]
)
def test_a_pixel_belongs_to_a_mask_by_its_share_of_the_votes(threshold, pixels):
    rows = [[*bins(0, 0, 0, width, 1, width, 1, 0), EOS] for width in (10, 20, 30)]
    _, rle = task_of("segmentation", num_samples=3, threshold=threshold).mask(np.array(rows), IMAGE.frame(), (100, 50))
    assert mask_utils.decode(rle).sum() == pixels


# Keypoints


def test_points_are_in_pixels_of_the_image_and_inside_it():
    task = task_of("keypoint", crop=False)
    out = said(bins(20, 80, 90, 30), probs=[0.2, 0.4, 0.6, 0.8])
    (answer,) = task.answers(IMAGE, task.requests(IMAGE, [instance()]), [out])
    np.testing.assert_allclose(answer.keypoints, [[80, 20, 2], [30, 50, 2]], atol=1e-4)
    assert answer.keypoints.dtype == np.float32
    assert answer.keypoint_score == pytest.approx(0.5)


def test_invisible_points_are_placed_at_their_likeliest_position_with_its_likelihood():
    out = said(
        [*bins(20, 80), INVISIBLE, INVISIBLE],
        probs=[0.2, 0.4, 0.9, 0.9],
        best=[0, 0, *bins(30, 40)],
        best_probs=[1.0, 1.0, 0.6, 0.8],
    )
    for suppressed, points, likelihood in (
        (True, [[80, 20, 2], [40, 30, 1]], 0.5),
        (False, [[80, 20, 2], [0, 0, 0]], 0.6),
    ):
        task = task_of("keypoint", crop=False, suppress_invisible=suppressed)
        (answer,) = task.answers(IMAGE, task.requests(IMAGE, [instance()]), [out])
        np.testing.assert_allclose(answer.keypoints, points, atol=1e-4)
        assert answer.keypoint_score == pytest.approx(likelihood)


@pytest.mark.parametrize(("weight", "expected"), [(0.0, 0.5), (0.25, 0.475), (1.0, 0.4)])
def test_the_score_of_points_is_weighed_with_that_of_their_box(weight, expected):
    task = task_of("keypoint", crop=False, score_weight=weight)
    (answer,) = task.answers(IMAGE, task.requests(IMAGE, [instance()]), [said(bins(1, 2, 3, 4), probs=[0.4] * 4)])
    assert answer.score == pytest.approx(expected)


def test_points_are_asked_for_on_the_crop_of_the_object():
    task = task_of("keypoint", crop_padding=0.5, top_p=0.2)
    (request,) = task.requests(IMAGE, [instance((40, 10, 60, 30)), instance(category=KITE)])
    x0, y0, x1, y1 = request.region
    assert (x0, y0, x1, y1) == pytest.approx((30, 0, 70, 40), abs=2)
    frame = IMAGE.frame(request.region)
    assert frame.origin.tolist() == [x0, y0]
    np.testing.assert_allclose(
        (request.prompt[1:5] - 1000) / 100, frame.to_input_yxyx(np.array([[40.0, 10, 60, 30]]))[0], atol=0.0051
    )
    config = request.generation
    assert (config.max_new_tokens, config.eos_id, config.score_range, config.top_p) == (4, None, (1000, 1101), 0.2)
    assert config.score_without == INVISIBLE
    assert task_of("keypoint", suppress_invisible=False).generation(PERSON).score_without is None
    (answer,) = task.answers(IMAGE, [request], [said(bins(0, 0, 50, 50))])
    expected = np.array([frame.origin, frame.origin + frame.size / 2])
    np.testing.assert_allclose(answer.keypoints[:, :2], np.clip(expected, 0, [100, 50]), atol=1e-3)
    (whole,) = task_of("keypoint", crop=False).requests(IMAGE, [instance()])
    assert whole.region is None


def test_answers_about_objects_come_best_first_and_only_for_classes_that_have_some():
    task = task_of("keypoint", crop=False)
    requests = task.requests(IMAGE, [instance(), instance((1, 1, 9, 9))])
    outs = [said(bins(1, 2, 3, 4), probs=[p] * 4) for p in (0.2, 0.7)]
    assert [a.box_xyxy for a in task.answers(IMAGE, requests, outs)] == [(1, 1, 9, 9), (10, 10, 30, 30)]
    assert task.requests(IMAGE, []) == []
    with pytest.raises(InputError, match="the class 'kite' has no keypoints"):
        task.requests(IMAGE, [instance(category=KITE)])


def test_likelihoods_are_means_over_tokens_that_are_no_padding():
    tokens = np.array([[5, 6, 0, 0], [0, 0, 0, 0], [5, 5, 5, 5]])
    logprobs = np.log(np.array([[0.5, 0.25, 0.9, 0.9], [0.9] * 4, [0.1, 0.2, 0.3, 0.4]]))
    np.testing.assert_allclose(token_score(tokens, logprobs), [0.375, 0, 0.25])
    assert weighted_score(0.2, 0.6, 0.25) == pytest.approx(0.3)


# Asking about objects


def test_true_boxes_and_found_ones_are_asked_about_apart_and_crowds_never():
    target = Target(
        image=ImageRecord(1, None, 100, 50),
        boxes_xyxy=np.array([[0, 1, 20, 30], [5, 5, 9, 9], [50, 10, 60, 20]], np.float32),
        labels=np.array([5, 2, 5]),
        areas=np.ones(3, np.float32),
        iscrowd=np.array([False, False, True]),
        annotation_ids=np.arange(3),
        segmentations=(None,) * 3,
        keypoints=np.zeros((3, 2, 3), np.float32),
        captions=("a cat",),
    )
    for name, labels in (("segmentation", [5, 2]), ("keypoint", [5])):
        task = task_of(name)
        true = task.questions(target, None)
        assert list(true) == ["true_boxes"]
        assert [(i.category.label, i.score) for i in true["true_boxes"]] == [(label, 1.0) for label in labels]
        assert true["true_boxes"][0].box_xyxy == (0, 1, 20, 30)
        likely, unlikely = instance(score=0.05), instance(score=0.049)
        both = task.questions(target, [likely, unlikely, instance(category=KITE)])
        assert both["true_boxes"] == true["true_boxes"]
        expected = [likely] if name == "keypoint" else [likely, instance(category=KITE)]
        assert both["found_boxes"] == expected == task.subjects([likely, unlikely, instance(category=KITE)])
    assert task_of("detection").questions(target, None) == task_of("captioning").questions(target, None) == {"": None}
    object.__setattr__(target, "captions", ())
    assert task_of("captioning").questions(target, None) == {}


def test_answers_are_put_onto_the_objects_that_they_are_about():
    task = task_of("segmentation")
    found = [instance(score=0.9), instance((1, 1, 9, 9)), instance(category=KITE)]
    ring = np.zeros((3, 2), np.float32)
    merged = task.merge(
        found, [instance(score=0.1, polygons=[ring]), instance(category=KITE, score=0.2, mask_score=0.7)]
    )
    assert [len(i.polygons) for i in merged] == [1, 0, 0]
    assert [i.mask_score for i in merged] == [None, None, 0.7]
    assert [(i.box_xyxy, i.category, i.score) for i in merged] == [(i.box_xyxy, i.category, i.score) for i in found]
    assert task_of("detection").merge([1], [2]) == [1, 2]


def test_boxes_are_read_with_their_classes_and_scores():
    task = task_of("segmentation")
    checked = task.check_about(IMAGE, Boxes([[-5, 2, 30, 60], [1, 2, 3, 4]], ["KITE", " person"], [0.25, 0.75]))
    assert [(i.box_xyxy, i.category, i.score) for i in checked] == [
        ((0, 2, 30, 50), KITE, 0.25), ((1, 2, 3, 4), PERSON, 0.75)
    ]  # fmt: skip
    (one,) = task.check_about(IMAGE, Boxes([[1, 2, 3, 4]], "kite"))
    assert (one.category, one.score) == (KITE, 1.0)
    assert task.check_about(IMAGE, Boxes([], None)) == []
    (other,) = task.check_about(IMAGE, [instance(category=Category(77, 1, "kite "))])
    assert (other.category, other.box_xyxy) == (KITE, (10, 10, 30, 30))
    single = type(task)(task.config, VOCAB, (KITE,), None)
    assert single.check_about(IMAGE, Boxes([[1, 2, 3, 4]]))[0].category == KITE
    for boxes, categories, message in (
        ([[1, 2, 3, 4]], None, "boxes need categories"),
        ([[1, 2, 3, 4]], ["kite", "kite"], "1 boxes were given with 2 categories"),
        ([[1, 2, 3, 4]], "bird", "bird"),
        ([[1, 2, 1, 4]], "kite", "x1 > x0"),
        ([[1, 2, 3, 2]], "kite", "y1 > y0"),
        ([[1, 50, 3, 60]], "kite", "inside the image"),
        ([1, 2, 3, 4], "kite", r"got shape \(4,\)"),
        ([[1, 2, 3, 4, 5]], "kite", r"got shape \(1, 5\)"),
        ([[1, 2, math.inf, 4]], "kite", "finite numbers"),
    ):
        with pytest.raises(InputError, match=message):
            task.check_about(IMAGE, Boxes(boxes, categories))


def test_objects_in_words_are_read_as_boxes_with_names():
    task = task_of("segmentation")
    assert task.parse_about(" 1,2,3,4 red kite ;5.5,6,7,8 person; ") == Boxes(
        [[1, 2, 3, 4], [5.5, 6, 7, 8]], ["red kite", "person"]
    )
    assert task.parse_about("1,2,3,4") == Boxes([[1, 2, 3, 4]], None)
    with pytest.raises(InputError, match="--about 'kite' cannot be read; expected objects as"):
        task.parse_about("kite")


# Captions


def test_the_score_of_a_caption_is_its_mean_log_probability_without_padding():
    task = task_of("captioning", max_tokens=9, top_p=0.5)
    (request,) = task.requests(IMAGE, None)
    assert request.prompt.tolist() == [13]
    assert (request.generation.max_new_tokens, request.generation.eos_id, request.generation.top_p) == (9, 1201, 0.5)
    ids = [*(1200 + i for i in TEXT.encode("a cat sits")), 1201, 0, 0]
    probs = [0.5, 0.25, 0.5, 0.25, 0.9, 0.9]
    (caption,) = task.answers(IMAGE, [request], [said(ids, probs=probs)])
    assert caption.text == "a cat sits"
    assert caption.score == pytest.approx(1.5 * math.log(0.5))
    assert not caption.truncated
    assert task.answers(IMAGE, [request], [said(ids, cut=True)])[0].truncated
    assert task.answers(IMAGE, [request], [said([0, 0])])[0] == Caption("", -math.inf)
    with pytest.raises(ValueError, match="needs a text tokenizer"):
        type(task)(task.config, VOCAB, (), None).examples(
            Target(ImageRecord(1, None, 9, 9), *[np.zeros(0)] * 5, (), np.zeros((0, 0, 3)), ("a cat",)),
            (9, 9),
            np.random.default_rng(0),
        )


def test_a_caption_is_scored_against_those_of_its_image():
    metrics = [task_of("captioning").metric(()) for _ in range(2)]
    assert all(isinstance(metric, CaptionMetric) for metric in metrics)
    record = lambda i: Target(  # noqa: E731
        ImageRecord(i, None, 9, 9), *[np.zeros(0)] * 5, (), np.zeros((0, 0, 3)), ("a cat sits here", "the cat")
    )
    metrics[0].add(record(1), [Caption("a cat sits here", -1.0)])
    metrics[1].add(record(2), [])
    metrics[0].merge(metrics[1])
    result = metrics[0].result()
    # Four words were said, and the closest references have four and two: the penalty is exp(1 - 6 / 4).
    assert result.metrics["BLEU-1"] == pytest.approx(math.exp(1 - 6 / 4))
    assert (result.num_images, result.num_without_prediction) == (2, 1)
    assert result.summary().startswith("BLEU-4 0.607")
    assert "2 images, 1 of them without a prediction" in result.text()
    assert result.to_json()["num_without_prediction"] == 1
    assert result.to_json()["num_images"] == 2
    assert "TreebankWordTokenizer" in result.to_json()["tokenization"]


# Names, drawing, JSON, and what `pix2seq data sequences` shows


def test_metrics_are_named_by_task_and_question():
    names = [get_task(name).metric_name(get_task(name).main_metric) for name in ("detection", "captioning")]
    assert names == ["AP", "captioning/BLEU-4"]
    assert get_task("detection").metric_name("AP50", "some") == "some/AP50"
    for name in ("segmentation", "keypoint"):
        assert get_task(name).metric_name(get_task(name).main_metric) == f"{name}/true_boxes/AP"
        assert get_task(name).needs == ("detection",)
    kinds = {name: task_of(name).metric((KITE,)).kind for name in ("detection", "segmentation", "keypoint")}
    assert kinds == {"detection": "box", "segmentation": "mask", "keypoint": "keypoint"}


@pytest.mark.parametrize("name", ["detection", "segmentation", "keypoint"])
def test_answers_about_objects_are_written_and_drawn(name):
    task = task_of(name)
    content = task.to_json([instance(), instance(category=KITE)])
    assert list(content) == ["instances"]
    assert [entry["category"] for entry in content["instances"]] == ["Person", "kite"]
    blank = np.full((50, 100, 3), 255, np.uint8)
    canvas = Canvas(blank)
    task.draw(canvas, [instance()])
    assert (np.asarray(canvas.finish()) != 255).any()


def test_captions_are_written_and_drawn():
    task = task_of("captioning")
    assert task.to_json([Caption("a cat", -0.5)]) == {"captions": [{"text": "a cat", "score": -0.5}]}
    written = []
    canvas = Canvas(np.zeros((50, 100, 3), np.uint8))
    canvas.text = written.append
    task.draw(canvas, [Caption("a cat", -0.5), Caption("a dog", -1.0)])
    assert written == ["a cat / a dog"]


def sequence_of(name, **settings):
    """A training sequence about a person whose box and points are those of a hundred bins."""
    target = Target(
        image=ImageRecord(1, None, 100, 50),
        boxes_xyxy=np.array([[10, 10, 30, 40]], np.float32),
        labels=np.array([5]),
        areas=np.ones(1, np.float32),
        iscrowd=np.zeros(1, bool),
        annotation_ids=np.arange(1),
        segmentations=([np.array([[10, 10], [30, 10], [30, 40]], np.float32)],),
        keypoints=np.array([[[12, 20, 2], [0, 0, 0]]], np.float32),
        captions=("a cat sits",),
    )
    task = task_of(name, **settings)
    (example,) = task.examples(target, (50, 100), np.random.default_rng(0))
    return task, example


def test_training_sequences_are_shown_as_answers_in_pixels_of_the_input():
    task, example = sequence_of("detection", noise_objects=1, max_objects=4)
    assert task.summary(example) == "1 objects and 1 noise objects"
    real, noise = task.shown(example, (50, 100))
    assert real.box_xyxy == pytest.approx((10, 10, 30, 40))
    assert (real.category, noise.category.name) == (PERSON, "noise")
    canvas = Canvas(np.zeros((50, 100, 3), np.uint8))
    drawn = []
    canvas.instances, canvas.thin_box = lambda instances: drawn.extend(i.category.name for i in instances), drawn.append
    task.draw(canvas, [real, noise])
    assert drawn == ["Person", noise.box_xyxy]

    task, example = sequence_of("keypoint")
    assert task.summary(example) == "class Person"
    (shown,) = task.shown(example, (50, 100))
    assert shown.keypoints[0].tolist() == pytest.approx([12, 20, 2], abs=0.5)
    assert shown.score == 1.0

    task, example = sequence_of("segmentation")
    assert task.summary(example) == "class Person"
    (shown,) = task.shown(example, (50, 100))
    assert shown.box_xyxy == pytest.approx((10, 10, 30, 40), abs=0.5)
    assert shown.score == 1.0

    task, example = sequence_of("captioning", input_drop=0)
    assert task.summary(example) == "a cat sits"
    assert task.shown(example, (50, 100)) == [Caption("a cat sits", 0.0)]

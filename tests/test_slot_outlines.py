"""Outlines of what slots find, and examples that are shown by polygons: tokens, frames, steps, scores, limits."""

import json
from dataclasses import replace

import numpy as np
import pytest
from boxed import boxed_target
from example_model import CONFIG, untrained_predictor
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pycocotools import mask as mask_utils
from test_slots import CATEGORIES, IMAGE, OTHER, SIZE, THREE, VOCAB, encoded, examples, listed, said, words

from pix2seq.cli import main
from pix2seq.data.formats.coco import read_coco
from pix2seq.data.samples import SampleMaker
from pix2seq.data.shapes import write_shapes
from pix2seq.data.transforms import AugmentConfig
from pix2seq.errors import InputError
from pix2seq.evaluation import evaluate
from pix2seq.geometry.boxes import box_iou_xyxy
from pix2seq.metrics.mask_reward import mask_iou
from pix2seq.metrics.phrases import Asked
from pix2seq.metrics.presence import Found, PresenceMetric
from pix2seq.tasks.by_example import Exam, Examples, Kind
from pix2seq.tasks.by_words import ByWords
from pix2seq.tasks.by_words import Exam as WordsExam
from pix2seq.tasks.shown import Shown, given_examples
from pix2seq.tasks.slots import says_outline
from pix2seq.tokenizers.by_example import example_prompt, prompt_length
from pix2seq.tokenizers.slots import KINDS, outline_prompt
from pix2seq.types import Category, Instance
from pix2seq.vocab import EOS, NOISE, SEPARATOR

OUTLINES = {"outlines": True, "max_outlines": 3, "even_points": 24, "max_points": 40}
TASKS = [pytest.param(words, id="by_words"), pytest.param(examples, id="by_example")]


def diamond(box):
    x0, y0, x1, y1 = box
    return np.array([[(x0 + x1) / 2, y0], [x1, (y0 + y1) / 2], [(x0 + x1) / 2, y1], [x0, (y0 + y1) / 2]], np.float32)


def diamonds(target, but=()):
    """The target with a diamond in each box as its mask, apart from some objects without one."""
    rings = [None if i in but else [diamond(box)] for i, box in enumerate(target.boxes_xyxy)]
    return replace(target, segmentations=tuple(rings))


MASKED = diamonds(THREE)


def learned(task, target, companions=(), seed=0):
    maker = SampleMaker(CATEGORIES, [task], size=SIZE, augment=AugmentConfig(enabled=False))
    rng, pixels = np.random.default_rng(seed), encoded().pixels
    shown = {} if isinstance(task, ByWords) else {"by_example": [(each, pixels) for each in companions]}
    return maker.sample(target, pixels, None, rng, [rng], shown).examples[task.name]


def test_prompts_worked_by_hand():
    boxes = np.array([[0, 0.5, 1, 1], [0.25, 0, 0.5, 0.75]])  # times 96: 0 48 96 96, 24 0 48 72
    ring = np.array([[0.25, 0], [0.5, 0.75], [0.25, 0.75]])
    one, other = [1000, 1048, 1096, 1096], [1024, 1000, 1048, 1072]
    points = [1024, 1000, 1048, 1072, 1024, 1072]
    prompt = example_prompt(15, np.array([2, 0]), boxes, VOCAB, outlines=[(), (ring,)], short_points=8)
    assert prompt.tolist() == [15, KINDS[2], *one, KINDS[0], *other, SEPARATOR, *points]
    assert outline_prompt(15, boxes[1], VOCAB).tolist() == [15, *other]
    assert prompt_length(4, 0) == 21
    assert prompt_length(4, 12) == 1 + 4 * (5 + 1 + 24)


@given(st.integers(0, 2**32), st.integers(3, 12))
def test_no_prompt_is_longer_than_said(seed, short_points):
    rng = np.random.default_rng(seed)
    rings = [[rng.uniform(-0.2, 1.2, (int(rng.integers(3, 40)), 2)) for _ in range(rng.integers(1, 4))] for _ in "ab"]
    boxes = np.sort(rng.uniform(0, 1, (2, 2, 2)), axis=1).reshape(2, 4)
    prompt = example_prompt(15, np.arange(2), boxes, VOCAB, outlines=rings, short_points=short_points)
    assert len(prompt) <= prompt_length(2, short_points)


def test_the_longest_sequence_may_be_an_outline():
    assert words(max_objects=2, max_words=2, **OUTLINES).max_seq_len == 1 + 4 + 2 * 40 + 1
    assert words(max_objects=2, max_words=2).max_seq_len == 12
    assert examples(max_objects=2, max_examples=2, polygon_share=0.5, short_points=9).max_seq_len == 1 + 2 * 24 + 4 + 1


@pytest.mark.parametrize("closeup", [True, False])
@pytest.mark.parametrize("make", TASKS)
def test_outlines_are_taught_as_they_are_asked(make, closeup):
    """The taught answers, said in the frames that are asked about, are the masks in pixels of the image."""
    task, image = make(closeup=closeup, **OUTLINES), encoded()
    first, *rest = learned(task, MASKED, [OTHER])
    taught = {tuple(each.prompt.tolist()): each for each in rest if says_outline(each)}
    assert len(taught) == 3
    listing = task.requests(image, ["cup"] if make is words else Examples((Shown(encoded(1), (2.0, 2.0, 9.0, 9.0)),)))
    comparisons = task.follow_up(image, listing, [listed(first)])
    requests = task.follow_up(image, comparisons, [said([KINDS[0]], KINDS[0], 0.9)] * 3)
    assert {tuple(request.prompt.tolist()) for request in requests} == set(taught)
    completions = []
    for request in requests:
        example = taught[tuple(request.prompt.tolist())]
        assert (request.closeup is None) == (example.closeup is None) == (not closeup)
        if closeup:
            read = image.frame().to_input_yxyx(request.closeup.xyxy[None])[0]
            np.testing.assert_allclose(read, example.closeup, atol=1e-6)
        assert not request.references
        assert not example.others
        assert request.generation.max_new_tokens == 81
        assert example.targets[-1] == EOS
        assert set(example.weights.tolist()) == {task.config.outline_weight}
        completions.append(said(example.targets))
    assert task.follow_up(image, requests, completions) == []
    answers = task.answers(image, requests, completions)
    assert len(answers) == 3
    for answer in answers:
        (i,) = np.flatnonzero(box_iou_xyxy(np.array([answer.box_xyxy]), THREE.boxes_xyxy)[0] > 0.8)
        scale = 8.0  # pixels are coarse for a diamond of 6 x 10
        rings = [ring * scale for ring in answer.polygons]
        truth = [diamond(THREE.boxes_xyxy[i]) * scale]
        assert mask_iou(rings, truth, (int(IMAGE[1] * scale), int(IMAGE[0] * scale))) > (0.85 if closeup else 0.7)
        assert answer.mask_score == 1
        assert answer.score == pytest.approx(0.9)
    for request, completion in zip(requests, completions, strict=True):
        ((start, stop, about),) = task.parts(image, request, completion)
        assert (start, stop, about.box_xyxy) == (0, len(completion.tokens[0]), request.subject.box_xyxy)


def test_an_object_that_several_kinds_may_mean_is_outlined_once_and_one_of_none_never():
    task, image = examples(**OUTLINES), encoded()
    first, *_ = learned(task, MASKED, [OTHER])
    shown = [Shown(encoded(n), (1.0, 1.0, 9.0, 9.0)) for n in (1, 2)]
    listing = task.requests(image, Exam((Kind(1, shown[0]), Kind(2, shown[1]))))
    comparisons = task.follow_up(image, listing, [listed(first)])
    likely = {(0, 0): 0.9, (0, 1): 0.8, (1, 0): 0.05, (1, 1): 0.4, (2, 0): 0.05, (2, 1): 0.09}  # by object and kind
    order = {each.subject.listed.box_xyxy: None for each in comparisons}
    numbers = {box: i for i, box in enumerate(order)}
    scores = [likely[numbers[each.subject.listed.box_xyxy], each.subject.number] for each in comparisons]
    requests = task.follow_up(image, comparisons, [said([NOISE], KINDS[0], score) for score in scores])
    assert [numbers[request.subject.box_xyxy] for request in requests] == [0, 1]
    by_user = task.requests(image, Examples(shown[:1]))  # who gets what scores at least min_score, 0.5
    compared = task.follow_up(image, by_user, [listed(first)])
    found = task.follow_up(image, compared, [said([NOISE], KINDS[0], score) for score in (0.9, 0.4, 0.6)])
    assert [numbers[request.subject.box_xyxy] for request in found] == [0, 2]
    square = [1010, 1010, 1010, 1060, 1060, 1060, 1060, 1010, EOS]
    one, two = task.answers(image, requests, [said(square), said([EOS])])
    assert [(each.score, len(each.polygons)) for each in one.instances] == [
        (pytest.approx(0.9), 1),
        (pytest.approx(0.05), 0),
        (pytest.approx(0.05), 0),
    ]
    assert [round(each.score, 2) for each in two.instances] == [0.8, 0.4, 0.09]
    assert [len(each.polygons) for each in two.instances] == [1, 0, 0]


def test_an_exam_of_phrases_is_about_boxes_alone():
    task, image = words(**OUTLINES), encoded()
    first, *_ = learned(task, MASKED)
    exam = WordsExam((Asked("cup", THREE.boxes_xyxy[[0, 2]]),))
    comparisons = task.follow_up(image, task.requests(image, exam), [listed(first)])
    assert task.follow_up(image, comparisons, [said([KINDS[0]], KINDS[0], 0.9)] * 3) == []


@pytest.mark.parametrize("make", TASKS)
def test_nothing_found_needs_no_outlines(make):
    task, image = make(**OUTLINES), encoded()
    first, *_ = learned(task, MASKED, [OTHER])
    listing = task.requests(image, ["cup"] if make is words else Examples((Shown(encoded(1), (2.0, 2.0, 9.0, 9.0)),)))
    comparisons = task.follow_up(image, listing, [listed(first)])
    unlike = [said([NOISE], KINDS[0], 0.05)] * 3
    assert task.follow_up(image, comparisons, unlike) == []
    assert task.answers(image, comparisons, unlike) == []
    assert task.follow_up(image, listing, [said([EOS])]) == []


@pytest.mark.parametrize("make", TASKS)
def test_outlines_need_masks_and_the_setting(make):
    def outlined(task, target):
        return [each for each in learned(task, target, [OTHER]) if says_outline(each)]

    assert make(**OUTLINES).reads_masks
    assert not make().reads_masks
    assert outlined(make(), MASKED) == []
    assert outlined(make(**OUTLINES), THREE) == []  # boxes alone
    assert len(outlined(make(**OUTLINES), diamonds(THREE, but=[1]))) == 2
    assert len(outlined(make(**OUTLINES | {"max_outlines": 1}), MASKED)) == 1
    one = make(**OUTLINES | {"max_outlines": 1})
    drawn = [[e.prompt.tolist() for e in learned(one, MASKED, [OTHER], s) if says_outline(e)] for s in (0, 1, 2, 3, 0)]
    assert drawn[0] == drawn[-1]  # a function of the seed
    assert len({tuple(prompt) for (prompt,) in drawn}) > 1
    task = make(**OUTLINES)
    assert {task.summary(each) for each in outlined(task, MASKED)} == {
        f"outline of {len(each.targets)} tokens" for each in outlined(task, MASKED)
    }
    for each in outlined(task, MASKED):
        (shown,) = task.shown(each, SIZE)
        (i,) = np.flatnonzero(box_iou_xyxy(np.array([shown.box_xyxy]), 2 * THREE.boxes_xyxy)[0] > 0.8)
        assert mask_iou(shown.polygons, [2 * diamond(THREE.boxes_xyxy[i])], SIZE) > 0.8


def test_masks_of_run_lengths_are_outlined_and_shown():
    rle = mask_utils.frPyObjects([(2 * diamond(box)).ravel().tolist() for box in THREE.boxes_xyxy[:1]], *SIZE)[0]
    big = boxed_target(2 * THREE.boxes_xyxy[:1], [1], SIZE[::-1], image_id=1)
    masked = replace(big, segmentations=(rle,), companions=(replace(big, segmentations=(rle,)),))
    task = examples(**OUTLINES | {"polygon_share": 1.0, "max_examples": 1, "short_points": 8, "prompts": 1})
    found = task.examples(masked, SIZE, np.random.default_rng(0))
    (outline,) = [each for each in found if says_outline(each)]
    (shown,) = task.shown(outline, SIZE)
    assert mask_iou(shown.polygons, [2 * diamond(THREE.boxes_xyxy[0])], SIZE) > 0.8
    assert all(each.prompt[6] == SEPARATOR for each in found if each.choices is not None)


def test_examples_are_taught_as_boxes_and_polygons_in_the_frame_of_their_closeup():
    task = examples(max_examples=1, max_slots=1, prompts=4, polygon_share=0.5, short_points=8)
    lengths = []
    for seed in range(20):
        for example in learned(task, MASKED, [diamonds(OTHER)], seed=seed)[1:]:
            assert len(example.prompt) + 1 <= task.max_seq_len
            lengths.append(len(example.prompt))
            if len(example.prompt) == 1 + 5 + 4:
                continue
            assert example.prompt[6] == SEPARATOR
            points = VOCAB.coords(example.prompt[7:-4]).reshape(-1, 2)
            box = VOCAB.coords(example.prompt[2:6]).reshape(2, 2)
            np.testing.assert_allclose([points.min(0), points.max(0)], box, atol=1.5 / 96)  # a diamond reaches its box
            np.testing.assert_allclose(box.mean(0), [0.5, 0.5], atol=0.02)  # it lies in the middle of a closeup
    assert 0.3 < np.mean(np.array(lengths) == 10) < 0.7
    plain = examples(max_examples=1, prompts=4)
    assert not plain.reads_masks
    assert {len(each.prompt) for each in learned(plain, MASKED, [diamonds(OTHER)])[1:]} == {10}
    unmasked = learned(examples(max_examples=1, prompts=4, polygon_share=1.0), MASKED, [OTHER])[1:]
    assert {len(each.prompt) for each in unmasked} == {10}


@pytest.mark.parametrize("closeup", [True, False])
def test_a_polygon_is_asked_as_it_is_taught(closeup):
    task = examples(max_examples=1, prompts=1, polygon_share=1.0, closeup=closeup, short_points=8)
    first, *comparisons = learned(task, MASKED, [diamonds(OTHER)])
    (shown,) = given_examples((encoded(1), diamond(OTHER.boxes_xyxy[0])))
    assert shown.box_xyxy == tuple(OTHER.boxes_xyxy[0].tolist())
    about = task.check_about(encoded(), Examples((shown,)))
    asked = task.follow_up(encoded(), task.requests(encoded(), about), [listed(first)])
    assert comparisons
    assert {tuple(each.prompt[2:-4].tolist()) for each in comparisons} == {
        tuple(each.prompt[2:-4].tolist()) for each in asked
    }
    plain = examples(max_examples=1, closeup=closeup)  # reads boxes alone
    boxed = Examples((replace(shown, polygons=()),))
    prompts = [plain.meanings(encoded(), each)[0].prompt.tolist() for each in (about, boxed)]
    assert prompts[0] == prompts[1] == task.meanings(encoded(), boxed)[0].prompt.tolist()


@pytest.mark.parametrize(
    ("place", "rings", "box"),
    [
        ((1, 2, 3, 4), 0, (1, 2, 3, 4)),
        ([(1, 2), (9, 2), (5, 8)], 1, (1, 2, 9, 8)),
        (np.array([[1, 2], [9, 2], [5, 8]]), 1, (1, 2, 9, 8)),
        ([np.array([[1, 2], [9, 2], [5, 8]]), [(0, 0), (2, 0), (2, 3), (0, 3)]], 2, (0, 0, 9, 8)),  # ragged
        ([[(1, 2), (9, 2), (5, 8)], [(0, 0), (2, 0), (2, 3)]], 2, (0, 0, 9, 8)),
        (np.array([[(1, 2), (9, 2), (5, 8)], [(0, 0), (2, 0), (2, 3)]]), 2, (0, 0, 9, 8)),
        ([1, 2, 9, 2, 5, 8], 1, (1, 2, 9, 8)),
        ([[1, 2, 9, 2, 5, 8], [0, 0, 2, 0, 2, 3, 0, 3]], 2, (0, 0, 9, 8)),  # as in NAME.json
        ([[1, 2, 9, 2, 5, 8]], 1, (1, 2, 9, 8)),
    ],
)
def test_an_example_is_a_box_a_polygon_or_several(place, rings, box):
    (shown,) = given_examples(("a.jpg", place))
    assert (len(shown.polygons), shown.box_xyxy) == (rings, box)


@pytest.mark.parametrize(
    "place",
    [[(1, 2), (9, 2)], [(1, 2, 3), (9, 2, 3), (1, 1, 1)], [[(1, 2), (9, 2), (5, 8)], 7], [], "box", None, (1, 2)],
)
def test_what_is_neither_is_refused(place):
    with pytest.raises(InputError, match=r"by a box, four numbers x0, y0, x1, y1, or by a polygon of three or more"):
        given_examples(("a.jpg", place))


def test_a_polygon_beyond_its_image_is_clipped():
    task = examples(polygon_share=0.5)
    shown = Shown(encoded(1), (40.0, 20.0, 60.0, 40.0), polygons=(diamond((40, 20, 60, 40)),))
    (clipped,) = task.check_about(encoded(), Examples((shown,))).shown
    assert clipped.box_xyxy == (40, 22, 48, 32)  # its upper left side is at y = 22 where the image ends
    points = np.concatenate(clipped.polygons)
    assert (points >= 0).all()
    assert (points <= IMAGE).all()
    (far,) = given_examples((encoded(1), [(-100, 0), (10, 29), (-100, 32)]))
    (part,) = task.check_about(encoded(), Examples((far,))).shown
    x0, y0, x1, y1 = part.box_xyxy
    assert (x0, x1) == (0, 10)
    assert 26 < y0 < y1 < 30  # of what is seen, not of the polygon
    (outside,) = given_examples((encoded(1), [(-40, 10), (10, -40), (-40, -40)]))
    with pytest.raises(InputError, match="has no area inside its image of 48 x 32"):
        task.check_about(encoded(), Examples((outside,)))


def test_masks_are_scored_beside_boxes_by_hand():
    """Two objects in the right boxes; the mask of one is the true diamond, that of the other a corner beside it."""
    cup, pen = Category(1, 1, "cup"), Category(2, 2, "pen")
    boxes = [(0, 0, 40, 40), (50, 50, 90, 90)]
    target = diamonds(boxed_target(boxes, [1, 2], (100, 100), image_id=1))
    corner = np.array([[50, 50], [60, 50], [50, 60]], np.float32)
    right = Found(1, (Instance(boxes[0], cup, 0.9, [diamond(boxes[0])]),))
    wrong = Found(2, (Instance(boxes[1], pen, 0.9, [corner]),))
    metric, other = (PresenceMetric([cup, pen], 0.5, with_masks=True) for _ in range(2))
    metric.add(target, [right])
    other.add(replace(target, image=replace(target.image, id=2)), [wrong])
    metric.merge(other)
    scores = metric.result().metrics
    assert scores["AP"] == pytest.approx(1)
    assert scores["mask_AP"] == scores["mask_AP50"] == pytest.approx(0.5)
    assert "mask_AP" not in PresenceMetric([cup], 0.5).result().metrics
    assert set(PresenceMetric([cup], 0.5, with_masks=True).result().metrics.values()) == {None}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("outlines") / "shapes"
    write_shapes(folder, num_train=6, num_val=4, size=64, seed=3, max_objects=4, workers=1)
    return folder


@pytest.fixture(scope="module")
def predictor():
    """It reads polygons and answers with them, of few points."""
    options = {"outlines": True, "max_points": 12, "even_points": 8, "polygon_share": 0.5, "short_points": 6}
    return untrained_predictor(config=replace(CONFIG, **options))


def test_a_model_that_reads_polygons_is_scored_by_them_too(predictor, folder):
    scores = evaluate(predictor, read_coco(folder, "val"), ["by_example"]).metrics
    assert {"by_example/mask_AP50", "by_example/polygons/AP50", "by_example/polygons/mask_AP50"} <= set(scores)
    assert (
        "by_example/polygons/AP50"
        not in evaluate(untrained_predictor(), read_coco(folder, "val"), ["by_example"]).metrics
    )


def test_polygons_are_taken_and_answered_from_python_and_the_command_line(predictor, folder, tmp_path):
    first, second, *_ = sorted(folder.rglob("*.jpg"))
    ring = [(3, 3), (40, 10), (20, 30)]
    found = predictor.find(str(first), like=(str(second), ring), threshold=0.0)
    assert found
    assert all(each.mask_score is not None for each in found)
    assert any(each.polygons for each in found)
    width, height = Image.open(first).size
    for each in found:
        for polygon in each.polygons:
            assert ((polygon >= 0) & (polygon <= [width, height])).all()
    predictor.model.save_pretrained(tmp_path / "model")
    command = ["predict", str(first), "--checkpoint", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    assert main([*command, "--min-score", "0.3", "--task", "by_example", "--about", f"{second}:3,3,40,10,20,30"]) == 0
    some = json.loads((tmp_path / "out" / f"{first.stem}.json").read_text())["by_example"]
    assert len(some) == sum(each.score >= 0.3 for each in found)
    assert main([*command, "--overwrite", "--min-score", "0", "--like", f"{second}:3,3,40,10,20,30"]) == 0
    content = json.loads((tmp_path / "out" / f"{first.stem}.json").read_text())["by_example"]
    assert len(content) == len(found)
    assert [len(each["segmentation"]) for each in content] == [len(each.polygons) for each in found]

"""The two steps of tasks with slots: what is taught is what is asked, perfect answers have perfect scores, limits."""

from dataclasses import replace

import numpy as np
import pytest
from boxed import boxed_target

from pix2seq.data.samples import SampleMaker
from pix2seq.data.transforms import AugmentConfig
from pix2seq.metrics.phrases import Asked
from pix2seq.model.decoding.completion import Completion
from pix2seq.tasks.by_example import ByExample, ByExampleConfig, Examples, Kind
from pix2seq.tasks.by_example import Exam as ByExampleExam
from pix2seq.tasks.by_words import ByWords, ByWordsConfig
from pix2seq.tasks.by_words import Exam as ByWordsExam
from pix2seq.tasks.request import EncodedImage
from pix2seq.tasks.shown import Shown
from pix2seq.tokenizers.slots import KINDS, OBJECT
from pix2seq.tokenizers.text import WordTokenizer
from pix2seq.types import Category
from pix2seq.vocab import EOS, NOISE, Vocab

SIZE = (64, 96)  # of the input: height, width
IMAGE = (48, 32)  # width, height, which the input shows at twice the size
CATEGORIES = [Category(1, 1, "cup"), Category(2, 2, "pen")]
TEXT = WordTokenizer.build([], required=["cup cups pen pens thing things the a an all", "left right top bottom centre"])
VOCAB = Vocab(num_bins=97, text_base=1100, size=1100).with_text(TEXT.size)
LIMITS = {"max_objects": 8, "noise_objects": 2, "named": 3, "others": 1, "box_jitter": 0.0}


def words(**settings):
    return ByWords(ByWordsConfig(**LIMITS | {"max_words": 8, "phrases": 8} | settings), VOCAB, CATEGORIES, TEXT)


def examples(**settings):
    return ByExample(ByExampleConfig(**LIMITS | {"prompts": 8} | settings), VOCAB, CATEGORIES)


TASKS = [pytest.param(words, id="by_words"), pytest.param(examples, id="by_example")]


def target_of(boxes, labels, crowd=(), image_id=1):
    return boxed_target(boxes, labels, IMAGE, image_id=image_id, crowd=crowd)


THREE = target_of([(2, 3, 12, 9), (20, 4, 44, 12), (15, 16, 25, 30)], [1, 2, 1])
OTHER = target_of([(30, 10, 40, 26)], [1], image_id=2)


def encoded(number=0):
    pixels = np.full((IMAGE[1], IMAGE[0], 3), number, np.uint8)
    return EncodedImage(memory=None, pixels=pixels, input_size=SIZE)


def taught(task, target, companions=(OTHER,)):
    """The list and the comparisons of an image; descriptions are left out."""
    maker = SampleMaker(CATEGORIES, [task], size=SIZE, augment=AugmentConfig(enabled=False))
    rng, pixels = np.random.default_rng(0), encoded().pixels
    shown = {} if isinstance(task, ByWords) else {"by_example": [(each, pixels) for each in companions]}
    first, *rest = maker.sample(target, pixels, None, rng, [rng], shown).examples[task.name]
    return first, [each for each in rest if each.choices is not None]


def questions(task, image):
    """The first step of asking the image for cups."""
    if isinstance(task, ByWords):
        return task.requests(image, ["cup"])
    return task.requests(image, Examples((Shown(encoded(1), tuple(OTHER.boxes_xyxy[0].tolist())),)))


def said(ids, best=OBJECT, scores=1.0):
    """What the model says, with the probabilities of `best`."""
    ids = np.array([ids])
    logprobs = np.broadcast_to(np.log(np.maximum(scores, 1e-9)), ids.shape)
    return Completion(ids, np.zeros(ids.shape), np.full_like(ids, best), logprobs, np.zeros(1, np.bool_))


def listed(example):
    """A list, said as it was taught."""
    return said(example.targets, OBJECT, np.where(example.targets == NOISE, 0.0, 1.0))


def frames_of(image, request):
    """What a request reads, as `yxyx` of the input of its image; None for a whole one."""
    views = [(image, request.closeup), *((each.image, each.closeup) for each in request.references)]
    return [
        None if view is None else each.frame().to_input_yxyx(view.xyxy[None])[0].astype(np.float32)
        for each, view in views
    ]


@pytest.mark.parametrize("closeup", [True, False])
@pytest.mark.parametrize("make", TASKS)
def test_what_is_taught_is_what_is_asked(make, closeup):
    """Of an input and images that are not square."""
    task, image = make(closeup=closeup), encoded()
    first, comparisons = taught(task, THREE)
    (listing,) = questions(task, image)
    assert listing.prompt.tolist() == first.prompt.tolist()
    groups = first.targets[:-1].reshape(-1, 5)
    boxes = {tuple(ids[:4].tolist()) for ids in groups if ids[4] == OBJECT}
    expected = VOCAB.coord_ids(THREE.boxes_xyxy[:, [1, 0, 3, 2]] / [32, 48, 32, 48])
    assert boxes == {tuple(row) for row in expected.tolist()}
    asked = task.follow_up(image, [listing], [listed(first)])
    assert len(asked) == 3
    views = {tuple(request.prompt[-4:].tolist()): frames_of(image, request) for request in asked}
    compared = 0
    for example in comparisons:
        if make is examples and example.prompt[2:-4].tolist() != asked[0].prompt[2:-4].tolist():
            continue  # of more examples
        read = [example.closeup, *(view.closeup for view in example.others)]
        for one, other in zip(read, views[tuple(example.prompt[-4:].tolist())], strict=True):
            if one is None or other is None:
                assert one is other
            else:
                np.testing.assert_allclose(one, other, atol=1e-6)
        compared += 1
    assert compared > 2


@pytest.mark.parametrize("make", TASKS)
def test_perfect_answers_have_perfect_scores(make):
    task, image = make(), encoded()
    target = replace(THREE, companions=(OTHER, target_of([(1, 1, 9, 9)], [2], image_id=3)))
    first, _ = taught(task, target, target.companions)
    if isinstance(task, ByWords):
        exam = ByWordsExam(
            (Asked("cup", THREE.boxes_xyxy[[0, 2]]), Asked("pens", THREE.boxes_xyxy[[1]]), Asked("thing"))
        )
        meant = [{0, 2}, {1}, set()]
    else:
        shown = [Shown(encoded(n), (1.0, 1.0, 9.0, 9.0)) for n in (1, 2)]
        exam = ByExampleExam((Kind(1, shown[0]), Kind(2, shown[1])))
        meant = [{0, 2}, {1}]
    listing = task.requests(image, exam)
    requests = task.follow_up(image, listing, [listed(first)])
    assert len(requests) == 3 * len(meant)
    completions = []
    for request in requests:
        middle = np.array(request.subject.listed.box_xyxy).reshape(2, 2).mean(0)
        distances = np.abs(THREE.boxes_xyxy.reshape(-1, 2, 2).mean(1) - middle).sum(1)
        is_meant = int(distances.argmin()) in meant[request.subject.number]
        completions.append(said([KINDS[0] if is_meant else NOISE], KINDS[0], 0.9 if is_meant else 0.1))
    assert task.follow_up(image, requests, completions) == []
    metric = task.metric(CATEGORIES)
    metric.add(target, task.answers(image, requests, completions))
    scores = metric.result().metrics
    assert scores["AP50"] == pytest.approx(1)
    assert scores["counting_error"] == 0
    assert scores["presence_MCC"] in (None, pytest.approx(1))  # by example, both kinds are there


@pytest.mark.parametrize("make", TASKS)
def test_crowds_are_neither_listed_nor_compared(make):
    crowded = target_of(THREE.boxes_xyxy, THREE.labels, crowd=[1])
    first, comparisons = taught(make(), crowded)
    assert (first.targets == OBJECT).sum() == 2
    crowd_ids = VOCAB.coord_ids(THREE.boxes_xyxy[1, [1, 0, 3, 2]] / [32, 48, 32, 48]).tolist()
    assert comparisons
    if make is words:
        assert not any(example.prompt[-4:].tolist() == crowd_ids for example in comparisons)
    assert {int(each.targets[0] != NOISE) for each in comparisons} <= {0, 1}
    nothing = target_of(THREE.boxes_xyxy[:1], [1], crowd=[0])
    assert make().examples(nothing, SIZE, np.random.default_rng(0))[1:] == []


@pytest.mark.parametrize("make", TASKS)
def test_a_list_of_too_many_objects_is_cut_without_noise(make):
    first, _ = taught(make(max_objects=2, noise_objects=4), THREE)
    assert first.targets[4::5].tolist() == [OBJECT, OBJECT]
    assert first.targets[-1] == EOS
    assert len(first.targets) == 11


def test_the_longest_sequence_is_a_list_or_a_comparison():
    assert words(max_objects=8, max_words=8).max_seq_len == 1 + 5 * 8 + 1
    assert words(max_objects=2, max_words=30).max_seq_len == 2 + 30 + 1 + 4 + 1
    assert examples(max_objects=2, max_examples=4).max_seq_len == 1 + 5 * 4 + 4 + 1


def test_a_companion_that_lost_its_object_moves_no_other():
    """The second of three companions is cropped away; the third keeps its number."""
    third = target_of([(5, 5, 20, 20)], [2], image_id=4)
    _, comparisons = taught(examples(max_examples=3, more_share=1.0), THREE, [OTHER, target_of([], []), third])
    assert {view.companion for each in comparisons for view in each.others[:]} == {0, 2}


@pytest.mark.parametrize("make", TASKS)
def test_the_parts_of_a_comparison_are_its_answer(make):
    task, image = make(), encoded()
    first, _ = taught(task, THREE)
    request = task.follow_up(image, questions(task, image), [listed(first)])[0]
    ((start, stop, answer),) = task.parts(image, request, said([KINDS[0]], KINDS[0], 0.9))
    assert (start, stop) == (0, 1)
    assert answer.box_xyxy == request.subject.listed.box_xyxy
    assert answer.score == pytest.approx(0.9)
    assert task.parts(image, request, said([NOISE], KINDS[0], 0.1)) == [(0, 1, None)]  # below min_score


@pytest.mark.parametrize("make", TASKS)
def test_answers_have_at_least_the_score_that_is_set(make):
    image = encoded()
    for least, expected in ((0.0, 3), (0.5, 1), (0.95, 0)):
        task = make(min_score=least)
        first, _ = taught(task, THREE)
        requests = task.follow_up(image, questions(task, image), [listed(first)])
        completions = [said([NOISE], KINDS[0], score) for score in (0.9, 0.4, 0.3)]
        assert len(task.answers(image, requests, completions)) == expected


def test_summaries_say_what_a_sequence_teaches():
    for task in (words(), examples()):
        first, comparisons = taught(task, THREE)
        assert task.summary(first) == "3 objects"
        for each in comparisons:
            assert task.summary(each).endswith(": no" if each.targets[0] == NOISE else ": yes")


@pytest.mark.parametrize("make", TASKS)
@pytest.mark.parametrize(
    ("slots", "named", "others", "expected"),
    [
        ([4, 4, 4, -1, -1, -1, -1], 2, 2, (2, 4)),
        ([4, 4, 4, -1, -1, -1, -1], 9, 1, (3, 3)),
        ([4, -1, -1, -1], 2, 2, (1, 2)),
        ([-1, -1, -1, -1], 2, 3, (0, 3)),  # none has the slot
        ([4, 4], 2, 3, (2, 0)),  # all have it
    ],
)
def test_so_many_others_are_compared_for_each_object_of_a_slot(make, slots, named, others, expected):
    task, rng = make(named=named, others=others), np.random.default_rng(0)
    boxes = [(2 * i, 2 * i, 2 * i + 9, 2 * i + 7) for i in range(len(slots))]
    objects = task.objects(target_of(boxes, np.ones(len(slots))), SIZE, rng)
    found = task.learned_comparisons(np.array([1, 2]), np.array(slots), range(4, 5), objects, rng)
    assert (sum(e.targets[0] == KINDS[4] for e in found), sum(e.targets[0] == NOISE for e in found)) == expected
    closeups = {id(each.others[0].closeup if each.closeup is None else each.closeup) for each in found}
    assert len(closeups) == len(found)  # no object twice

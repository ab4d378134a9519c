"""What each task teaches about a target, worked by hand; and the settings that change it."""

import numpy as np
import pytest

import pix2seq.tasks as registry
from pix2seq.errors import InputError
from pix2seq.tasks import BUILT_IN, get_task, register_task, task_names
from pix2seq.tasks.detection import Detection, object_order
from pix2seq.tasks.task import TaskConfig
from pix2seq.tokenizers.text import SentencePieceTokenizer, WordTokenizer
from pix2seq.types import Category, ImageRecord, Target
from pix2seq.vocab import INVISIBLE, NOISE, Vocab

TEXT = WordTokenizer.build(["a cat sits", "a dog runs fast", "two kites"])
VOCAB = Vocab(num_bins=101, text_base=1200, size=1200).with_text(TEXT.size)  # a pixel of 100 is a bin
KITE_CATEGORY = Category(2, 8, "kite")
CATEGORIES = (KITE_CATEGORY, Category(5, 9, "person", ("nose", "left_hand", "right_hand")))
SIZE = (100, 50)  # height, width


def task_of(name, **settings):
    task_type = get_task(name)
    return task_type(task_type.config_type(**settings), VOCAB, CATEGORIES, TEXT)


def target_of(*, crowd=(False, False, False)):
    """A kite, a person and a small person, one below the other."""
    boxes = np.array([[0, 0, 50, 40], [10, 50, 40, 90], [5, 92, 15, 98]], np.float32)
    points = np.zeros((3, 3, 3), np.float32)
    points[1] = [[20, 60, 2], [12.5, 70, 1], [0, 0, 0]]
    points[2] = [[10, 95, 2], [0, 0, 0], [0, 0, 0]]
    return Target(
        image=ImageRecord(1, None, 50, 100),
        boxes_xyxy=boxes,
        labels=np.array([2, 5, 5]),
        areas=np.ones(3, np.float32),
        iscrowd=np.array(crowd),
        annotation_ids=np.arange(3),
        segmentations=tuple([box[[0, 1, 2, 1, 2, 3]].reshape(3, 2)] for box in boxes),
        keypoints=points,
        captions=("a cat sits", "a dog runs fast", "two kites"),
    )


def examples(name, target=None, seed=0, **settings):
    return task_of(name, **settings).examples(target or target_of(), SIZE, np.random.default_rng(seed))


def objects(example):
    """The written objects as [y0, x0, y1, x1, class], in bins and as an id."""
    groups = example.targets[: len(example.targets) // 5 * 5].reshape(-1, 5)
    return [[*(ids[:4] - 1000).tolist(), int(ids[4])] for ids in groups]


KITE, PERSON, SMALL = [0, 0, 40, 100, 102], [50, 20, 90, 80, 105], [92, 10, 98, 30, 105]


@pytest.mark.parametrize(
    ("order", "expected"), [("area", [KITE, PERSON, SMALL]), ("corner", [KITE, PERSON, SMALL]), ("random", None)]
)
def test_detection_writes_objects_in_its_order(order, expected):
    (example,) = examples("detection", noise_objects=0, order=order)
    assert example.prompt.tolist() == [10]
    found = objects(example)
    assert sorted(found) == sorted([KITE, PERSON, SMALL])
    if expected:
        assert found == expected
    else:
        first = {tuple(objects(examples("detection", noise_objects=0, seed=s)[0])[0]) for s in range(20)}
        assert len(first) == 3


def test_orders_differ_where_a_large_object_lies_far_from_the_corner():
    target = target_of()
    boxes = target.boxes_xyxy.copy()
    boxes[0] = [1, 1, 5, 5]
    object.__setattr__(target, "boxes_xyxy", boxes)
    labels = lambda order: [o[4] for o in objects(examples("detection", target, noise_objects=0, order=order)[0])]  # noqa: E731
    assert labels("area") == [105, 105, 102]
    assert labels("corner") == [102, 105, 105]


def test_orders_are_by_area_and_by_the_square_of_the_distance_to_the_corner():
    # The second lies nearer than the first in squares, and farther in cubes.
    boxes = np.array([[0.6, 0.6, 0.7, 0.7], [0.82, 0.05, 0.95, 0.95], [0.0, 0.0, 0.2, 0.2]], np.float32)
    assert object_order(boxes, "corner", np.random.default_rng(0)).tolist() == [2, 1, 0]
    taller = np.array([[0.1, 0.1, 0.9, 0.2], [0.2, 0.2, 0.3, 0.4]], np.float32)
    assert object_order(taller, "corner", np.random.default_rng(0)).tolist() == [0, 1]
    assert object_order(boxes, "area", np.random.default_rng(0)).tolist() == [1, 2, 0]
    even = np.zeros((5, 4), np.float32)
    assert object_order(even, "area", np.random.default_rng(0)).tolist() == [0, 1, 2, 3, 4]


def test_detection_does_not_learn_crowds():
    (example,) = examples("detection", target_of(crowd=[False, True, False]), noise_objects=0, order="area")
    assert objects(example) == [KITE, SMALL]


def test_noise_fills_a_sequence_or_is_counted_and_then_an_end_follows():
    (filled,) = examples("detection", max_objects=8, order="area")
    assert len(filled.targets) == 8 * 5
    assert [o[4] for o in objects(filled)] == [102, 105, 105, *[NOISE] * 5]
    (counted,) = examples("detection", max_objects=8, noise_objects=2, noise_weight=0.5, eos_weight=0.3)
    assert len(counted.targets) == 5 * 5 + 1
    assert counted.targets[-1] == 0
    assert counted.weights.tolist() == pytest.approx([1] * 15 + [0, 0, 0, 0, 0.5] * 2 + [0.3])
    (full,) = examples("detection", max_objects=4, noise_objects=9)
    assert [o[4] == NOISE for o in objects(full)] == [False] * 3 + [True]
    (cut,) = examples("detection", max_objects=2, order="area")
    assert objects(cut) == [KITE, PERSON]


def test_detection_draws_each_sequence_of_an_image_anew():
    several = examples("detection", sequences_per_image=4, max_objects=6)
    assert len(several) == 4
    assert len({example.targets.tobytes() for example in several}) == 4


def test_classes_that_the_decoder_reads_are_corrupted_by_classes_of_the_model():
    read = {int(i) for s in range(60) for i in examples("detection", seed=s, max_objects=3)[0].inputs[4::5]}
    assert read == {NOISE, *range(100, 106)}
    (plain,) = examples("detection", class_corruption="none", noise_objects=0)
    assert plain.inputs.tolist() == plain.targets.tolist()


@pytest.mark.parametrize("crowd", [False, True])
def test_keypoints_are_learned_of_every_person_that_has_some_and_of_no_crowd(crowd):
    target = target_of(crowd=[False, False, crowd])
    task = task_of("keypoint", mask_inputs=False)
    assert task.samples(target) == ([1] if crowd else [1, 2])
    assert task_of("keypoint", crop=False).samples(target) == [None]
    found = {e.prompt.tolist()[1]: e for e in examples("keypoint", target, mask_inputs=False, invisible_weight=0.2)}
    assert set(found) == ({1050} if crowd else {1050, 1092})
    person = found[1050]
    assert person.prompt.tolist() == [12, 1050, 1020, 1090, 1080, 105]
    assert person.targets.tolist() == [1060, 1040, 1070, 1025, INVISIBLE, INVISIBLE]
    assert person.inputs.tolist() == person.targets.tolist()
    np.testing.assert_allclose(person.weights, [1, 1, 1, 1, 0.2, 0.2])
    hidden = [e.inputs for s in range(20) for e in examples("keypoint", target, seed=s)]
    assert any((inputs[:4] == INVISIBLE).any() for inputs in hidden)
    alone = target_of(crowd=[True, True, True])
    assert task.samples(alone) == task_of("keypoint", crop=False).samples(alone) == []


def test_a_person_without_labelled_points_or_of_an_unknown_class_teaches_nothing():
    target = target_of()
    object.__setattr__(target, "labels", np.array([2, 7, 5]))
    assert task_of("keypoint").samples(target) == [2]
    target.keypoints[2] = 0
    assert task_of("keypoint").samples(target) == []


def test_a_skeleton_may_be_a_single_point():
    task = task_of("keypoint")
    assert task.accepts(Category(1, 1, "cup", ("handle",)))
    assert not task.accepts(KITE_CATEGORY)


def test_masks_are_learned_of_every_object_that_has_one_and_of_no_crowd():
    settings = {"random_start": False, "eos_weight": 0.5}
    found = examples("segmentation", target_of(crowd=[False, True, False]), **settings)
    assert sorted(example.prompt[5] for example in found) == [102, 105]
    if task_of("segmentation").crop_padding is None:  # in the frame of the input
        (kite,) = (example for example in found if example.prompt[5] == 102)
        assert kite.targets.tolist() == [1000, 1000, 1000, 1100, 1040, 1100, 0]
    for example in found:
        assert example.prompt[0] == 11
        np.testing.assert_array_equal(example.inputs, example.targets)
        np.testing.assert_allclose(example.weights, [1, 1, 1, 1, 1, 1, 0.5])
    starts = {tuple(e.targets[:2]) for s in range(20) for e in examples("segmentation", seed=s) if e.prompt[5] == 102}
    assert len(starts) == 3
    nowhere = target_of()
    object.__setattr__(nowhere, "segmentations", ([np.zeros((3, 2), np.float32)], None, None))
    assert examples("segmentation", nowhere) == []


@pytest.mark.parametrize(("name", "most"), [("segmentation", 2), ("keypoint", 1)])
def test_tasks_about_objects_learn_from_some_of_them_drawn_at_random(name, most):
    drawn = {tuple(sorted(int(e.prompt[1]) for e in examples(name, seed=s, max_objects=most))) for s in range(30)}
    assert {len(each) for each in drawn} == {most}
    assert len(drawn) == (3 if name == "segmentation" else 2)


def test_a_mask_keeps_to_its_points():
    target = target_of()
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    circle = (np.column_stack([np.cos(angles), np.sin(angles)]) * 20 + 25).astype(np.float32)
    object.__setattr__(target, "segmentations", ([circle], None, None))
    (example,) = examples("segmentation", target, max_points=7)
    assert len(example.targets) <= 2 * 7 + 1


def test_captions_end_and_are_read_with_some_words_left_out():
    found = examples("captioning", input_drop=0.0, eos_weight=0.3)
    assert {TEXT.decode((e.targets - 1200).tolist()) for e in found} == {"a cat sits", "a dog runs fast", "two kites"}
    for example in found:
        assert example.prompt.tolist() == [13]
        assert example.targets[-1] == 1201
        np.testing.assert_array_equal(example.inputs, example.targets)
        np.testing.assert_allclose(example.weights, [1.0] * (len(example.targets) - 1) + [0.3])
    read = np.concatenate([e.inputs for s in range(100) for e in examples("captioning", seed=s, input_drop=0.7)])
    assert (read == NOISE).mean() == pytest.approx(0.7, abs=0.05)
    some = [examples("captioning", seed=s, captions_per_image=2, max_tokens=3) for s in range(20)]
    assert {len(each) for each in some} == {2}
    assert {len(e.targets) for each in some for e in each} == {3}
    assert len({tuple(e.targets[0] for e in each) for each in some}) > 2


def test_the_longest_sequences_are_told_with_prompt_and_end():
    longest = lambda name, **settings: task_of(name, **settings).max_seq_len  # noqa: E731
    assert longest("detection", max_objects=7) == 1 + 7 * 5 + 1
    assert longest("detection", max_objects=7, num_objects=9) == 1 + 9 * 5 + 1
    assert longest("detection", max_objects=7, num_objects=3) == 1 + 7 * 5 + 1
    assert longest("segmentation", max_points=20) == 6 + 20 * 2 + 1
    assert longest("keypoint") == 6 + 3 * 2
    assert longest("captioning", max_tokens=20) == 1 + 20


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("detection", {"order": "size"}),
        ("detection", {"max_objects": 0}),
        ("segmentation", {"max_points": 2}),
        ("segmentation", {"num_samples": 0}),
        ("segmentation", {"threshold": 0}),
        ("segmentation", {"threshold": 1.1}),
        ("segmentation", {"max_objects": 0}),
        ("keypoint", {"crop_padding": -0.1}),
        ("keypoint", {"max_objects": 0}),
        ("captioning", {"max_tokens": 1}),
        ("captioning", {"captions_per_image": 0}),
        ("captioning", {"input_drop": 1.0}),
        ("captioning", {"input_drop": -0.1}),
        ("captioning", {"flip": "sometimes"}),
        ("detection", {"batch_size": 0}),
        ("detection", {"loss_weight": -1}),
        ("detection", {"top_p": 0}),
        ("detection", {"top_p": 1.1}),
        ("detection", {"top_k": -1}),
        ("detection", {"temperature": -0.1}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused(name, settings):
    with pytest.raises(ValueError, match=rf"{next(iter(settings))}|temperature >= 0"):
        get_task(name).config_type(**settings)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("detection", {"order": "corner", "max_objects": 1, "batch_size": 1, "loss_weight": 0, "top_p": 1}),
        ("segmentation", {"max_points": 3, "num_samples": 1, "threshold": 1, "max_objects": 1}),
        ("keypoint", {"crop_padding": 0, "temperature": 0, "top_k": 0}),
        ("captioning", {"max_tokens": 2, "captions_per_image": 1, "input_drop": 0, "flip": "never"}),
        ("captioning", {"flip": "always"}),
    ],
    ids=str,
)
def test_settings_at_the_edge_are_accepted(name, settings):
    task = task_of(name, **settings)
    assert task.settings().items() >= settings.items()


def test_a_task_changes_its_settings_and_keeps_the_rest():
    task = task_of("segmentation", max_points=30)
    changed = task.with_settings(num_samples=3)
    assert (changed.config.max_points, changed.config.num_samples, task.config.num_samples) == (30, 3, 8)
    assert changed.vocab is VOCAB
    assert tuple(changed.categories.values()) == CATEGORIES
    assert changed.text is TEXT


def test_more_classes_than_ids_are_refused():
    vocab = Vocab(num_bins=10, coord_base=105, text_base=200, size=200)
    task_type = get_task("detection")
    assert task_type(task_type.config_type(), vocab, (Category(4, 4, "cat"),)).max_label == 4
    with pytest.raises(InputError, match="1 classes need ids up to 5, but the vocabulary holds labels 1 to 4"):
        task_type(task_type.config_type(), vocab, (Category(5, 5, "cat"),))
    numbered = task_type(task_type.config_type(), vocab, ())
    assert [(c.label, c.name) for c in numbered.categories.values()] == [(i, f"class {i}") for i in (1, 2, 3, 4)]


def test_captions_that_name_a_side_are_not_learned_mirrored():
    target = target_of()
    object.__setattr__(target, "captions", ("a man on the left", "two kites"))
    assert task_of("captioning").after_flip(target).captions == ("two kites",)
    assert task_of("detection").after_flip(target).captions == ("two kites",)
    assert task_of("captioning", flip="always").after_flip(target) is target
    assert [task_of("captioning", flip=flip).flips for flip in ("auto", "always", "never")] == [True, True, False]
    assert task_of("detection").flips


def test_words_come_from_the_captions_or_from_a_file(tmp_path):
    make = lambda **settings: get_task("captioning").make_text_tokenizer(  # noqa: E731
        get_task("captioning").config_type(**settings), ["a cat sits", "a dog sits", "a dog runs"]
    )
    assert make().tokens[3:] == ("a", "dog", "sits", "cat", "runs")
    assert make(min_count=2).tokens[3:] == ("a", "dog", "sits")
    assert make(text_size=4).tokens[3:] == ("a",)
    pieces = make(tokenizer="sentencepiece", text_size=20)
    assert isinstance(pieces, SentencePieceTokenizer)
    assert pieces.size <= 20
    pieces.save(tmp_path)
    assert make(tokenizer=str(tmp_path / "text.model")).tokens == pieces.tokens
    with pytest.raises(InputError, match=r"captioning\.tokenizer is 'letters'; expected words, sentencepiece or"):
        make(tokenizer="letters")
    with pytest.raises(NotImplementedError, match="detection reads text"):
        get_task("detection").make_text_tokenizer(TaskConfig(), [])


@pytest.fixture
def registered():
    yield registry._registered
    registry._registered.clear()


def test_a_registered_task_is_found_by_its_name(registered):
    class Other(Detection):
        name = "other"

    assert register_task(Other) is Other
    assert register_task(Other) is Other  # again
    assert get_task("other") is Other
    assert task_names() == (*BUILT_IN, "other")
    another = type("Another", (Detection,), {"name": "other"})
    for wrong, message in (
        (another, "there is a task 'other' already; give Another another name"),
        (type("Again", (Detection,), {"name": "detection"}), "there is a task 'detection' already"),
        (type("Named", (Detection,), {"name": "no name"}), "Named.name is 'no name'"),
        (type("Unnamed", (Detection,), {"name": 3}), "Unnamed.name is 3"),
        (type("Unset", (Detection,), {"name": "unset", "config_type": dict}), "Unset.config_type is"),
        (Detection(get_task("detection").config_type(), VOCAB, ()), "expected a subclass of Task"),
        (dict, "expected a subclass of Task"),
    ):
        with pytest.raises(ValueError, match=message):
            register_task(wrong)
    with pytest.raises(InputError, match="did you mean 'other'"):
        get_task("othr")


def test_the_task_of_a_package_is_loaded_when_it_is_asked_for(registered, monkeypatch):
    class Packaged(Detection):
        name = "packaged"

    class Point:
        dist, value = None, "package:Packaged"

        def __init__(self, found):
            self.found = found

        def load(self):
            if isinstance(self.found, Exception):
                raise self.found
            return self.found

    points = {"packaged": Point(Packaged), "misnamed": Point(Packaged), "broken": Point(ImportError("no module x"))}
    monkeypatch.setattr(registry, "_installed", lambda: points)
    assert task_names()[len(BUILT_IN) :] == ("broken", "misnamed", "packaged")
    assert not registered
    assert get_task("packaged") is Packaged
    assert registered == {"packaged": Packaged}
    with pytest.raises(InputError, match=r"the entry point 'misnamed' gives .* expected a Task with name = 'misnamed'"):
        get_task("misnamed")
    with pytest.raises(
        InputError, match=r"task 'broken' of package package:Packaged cannot be imported \(ImportError: no"
    ):
        get_task("broken")

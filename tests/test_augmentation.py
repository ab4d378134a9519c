"""Augmentation of an image with its labels: numbers worked by hand, and what a training sample says of it."""

from dataclasses import replace

import numpy as np
import pytest
from pycocotools import mask as mask_utils

from pix2seq.data.dataset import ClassMap
from pix2seq.data.samples import SampleMaker
from pix2seq.data.targets import crop_to_object, transform_target
from pix2seq.data.transforms import AugmentConfig, color_jitter, random_affine
from pix2seq.errors import InputError
from pix2seq.geometry.affine import Affine
from pix2seq.tasks.keypoint import Keypoint, KeypointConfig
from pix2seq.types import Category, ImageRecord, Target
from pix2seq.vocab import Vocab


def new_rng():
    return np.random.default_rng(0)


def drawn(source, target, count=1000, **settings):
    """Many affine maps as scale and offset by x and y, (count, 4)."""
    rng = new_rng()
    maps = [random_affine(source, target, AugmentConfig(**settings), rng) for _ in range(count)]
    return np.array([[m.scale_x, m.scale_y, m.offset_x, m.offset_y] for m in maps])


def target_of(boxes, *, width=100, height=80, labels=None, keypoints=None, crowd=None, segmentations=None):
    boxes = np.array(boxes, np.float32)
    count = len(boxes)
    return Target(
        image=ImageRecord(1, None, width, height),
        boxes_xyxy=boxes,
        labels=np.arange(1, count + 1) if labels is None else np.array(labels),
        areas=np.arange(10, 10 + count).astype(np.float32),
        iscrowd=np.zeros(count, bool) if crowd is None else np.array(crowd),
        annotation_ids=np.arange(50, 50 + count),
        segmentations=(None,) * count if segmentations is None else segmentations,
        keypoints=np.zeros((count, 0, 3), np.float32) if keypoints is None else np.array(keypoints, np.float32),
    )


def test_a_small_image_stays_in_the_top_left_corner_when_it_is_mirrored():
    # 40 x 60 fits into 100 x 200 at 2.5 times its size; half of that is 50 x 75.
    affine = random_affine((40, 60), (100, 200), AugmentConfig(scale_min=0.5, scale_max=0.5, flip=1.0), new_rng())
    assert affine.boxes(np.array([[0.0, 0, 60, 40], [0, 0, 6, 4]])).tolist() == [[0, 0, 75, 50], [67.5, 0, 75, 5]]


def test_scales_are_uniform_between_the_settings_or_else_the_range_of_the_task():
    low_high = lambda **settings: drawn((1000, 1000), (1000, 1000), flip=0.0, **settings)[:, 0]  # noqa: E731
    published = low_high()
    assert published.min() == pytest.approx(0.3, abs=0.02)
    assert published.max() == pytest.approx(2.0, abs=0.02)
    assert published.mean() == pytest.approx(1.15, abs=0.06)
    assert low_high(scale_min=1.5).min() == pytest.approx(1.5, abs=0.02)
    assert low_high(scale_min=1.5).max() == pytest.approx(2.0, abs=0.02)
    assert low_high(scale_max=0.5).max() == pytest.approx(0.5, abs=0.02)
    with pytest.raises(InputError, match="no scale is left from 3 to 2"):
        low_high(scale_min=3.0)  # above the range of the task
    narrow = random_affine((10, 10), (100, 100), AugmentConfig(flip=0.0), new_rng(), scale_range=(0.7, 0.7))
    assert (narrow.scale_x, narrow.scale_y) == (7, 7)


def test_crops_lie_anywhere_on_each_axis_by_itself():
    # 40 x 60 becomes 200 x 300 twice as large as it fits into 100 x 200: 100 rows and 100 columns are cut.
    _, _, left, top = drawn((40, 60), (100, 200), scale_min=2.0, scale_max=2.0, flip=0.0).T
    for offsets in (left, top):
        assert -100 <= offsets.min() < -90
        assert -10 < offsets.max() <= 0
        assert offsets.mean() == pytest.approx(-50, abs=6)
    assert abs(np.corrcoef(left, top)[0, 1]) < 0.2


def test_a_crop_of_one_axis_keeps_the_other():
    # 40 x 60 becomes 100 x 150 and fits into 100 x 200.
    scales = drawn((40, 60), (100, 200), scale_min=1.0, scale_max=1.0, flip=0.0, count=5)
    assert scales.tolist() == [[2.5, 2.5, 0, 0]] * 5
    sides = drawn((3, 1000), (100, 100), scale_min=0.1, scale_max=0.1, flip=0.0, count=1)
    assert sides.tolist() == [[0.01, 1 / 3, 0, 0]]  # at least one pixel high


def test_images_are_mirrored_as_often_as_asked():
    assert (drawn((10, 10), (10, 10))[:, 0] < 0).mean() == pytest.approx(0.5, abs=0.1)
    assert (drawn((10, 10), (10, 10), flip=0.1)[:, 0] < 0).mean() == pytest.approx(0.1, abs=0.06)
    assert (drawn((10, 10), (10, 10), flip=1.0, enabled=False) == [1, 1, 0, 0]).all()


@pytest.mark.parametrize(
    ("low", "high", "valid"),
    [(0.5, 0.5, True), (None, 0.1, True), (0.1, None, True), (0, 1, False), (-1, None, False), (0.6, 0.5, False)],
)
def test_scales_must_be_positive_and_in_order(low, high, valid):
    if valid:
        AugmentConfig(scale_min=low, scale_max=high)
    else:
        with pytest.raises(ValueError, match=r"augment\.scale_min"):
            AugmentConfig(scale_min=low, scale_max=high)


def test_every_label_of_a_kept_object_moves_and_others_go():
    ring = np.array([[1, 1], [9, 1], [9, 9]], np.float32)
    points = np.zeros((4, 3, 3))
    points[1] = [[10, 20, 2], [50, 40, 1], [20, 30, 0]]
    target = target_of(
        [[0, 0, 4, 4], [10, 20, 50, 40], [60, 60, 70, 70], [30, 30, 60, 50]],
        keypoints=points,
        crowd=[False, False, False, True],
        segmentations=([ring], [ring, ring + 20], [ring], [ring]),
    )
    # x' = 2 x - 20 and y' = y / 2 - 5, on 20 rows and 80 columns: the first and the third lie outside.
    moved = transform_target(target, Affine(2, 0.5, -20, -5), (20, 80))
    assert moved.boxes_xyxy.tolist() == [[0, 5, 80, 15], [40, 10, 80, 20]]
    assert moved.labels.tolist() == [2, 4]
    assert moved.areas.tolist() == [11, 13]
    assert moved.areas.dtype == np.float32
    assert moved.annotation_ids.tolist() == [51, 53]
    assert moved.iscrowd.tolist() == [False, True]
    assert [ring.tolist() for ring in moved.segmentations[0]] == [
        [[-18, -4.5], [-2, -4.5], [-2, -0.5]],
        [[22, 5.5], [38, 5.5], [38, 9.5]],
    ]
    assert moved.segmentations[1] is None  # a crowd
    # The border belongs to the image.
    assert moved.keypoints.tolist() == [[[0, 5, 2], [80, 15, 1], [0, 0, 0]], [[0, 0, 0]] * 3]
    assert moved.image is target.image
    assert transform_target(target, Affine(2, 0.5, -20, -5), (20, 80), with_masks=False).segmentations == (None, None)
    enlarged = transform_target(target, Affine(3, 2), (1000, 1000))
    assert enlarged.areas.tolist() == [60, 66, 72, 78]


@pytest.mark.parametrize("point", [[-0.5, 5], [5, -0.5], [10.5, 5], [5, 20.5]])
def test_a_point_beyond_any_side_is_no_longer_labelled(point):
    target = target_of([[0, 0, 9, 9]], keypoints=[[[*point, 2], [10, 20, 2]]])
    assert transform_target(target, Affine(1, 1), (20, 10)).keypoints[0].tolist() == [[0, 0, 0], [10, 20, 2]]


@pytest.mark.parametrize(("min_visible", "kept"), [(0.0, True), (0.25, True), (0.26, False)])
def test_an_object_goes_if_too_little_of_its_box_is_left(min_visible, kept):
    moved = transform_target(target_of([[-10, -10, 10, 10]]), Affine(1, 1), (50, 50), min_visible=min_visible)
    assert len(moved.labels) == kept


def test_masks_as_run_lengths_become_rings():
    mask = np.zeros((40, 50), np.uint8, order="F")
    mask[10:20, 5:30] = 1
    target = target_of([[5, 10, 30, 20]], segmentations=(mask_utils.encode(mask),))
    ((ring,),) = transform_target(target, Affine(2, 1, 3, 4), (100, 200)).segmentations
    assert [ring.min(0).tolist(), ring.max(0).tolist()] == [[13, 14], [63, 24]]
    assert transform_target(replace(target, segmentations=([],)), Affine(1, 1), (100, 200)).segmentations == (None,)


def test_a_crop_holds_one_object_and_its_pixels():
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (80, 100, 3)).astype(np.uint8)
    points = np.zeros((2, 2, 3))
    points[1] = [[40, 30, 2], [59, 44, 1]]
    target = target_of([[0, 0, 10, 10], [40, 30, 60, 45]], labels=[3, 4], keypoints=points, crowd=[True, False])
    cropped, pixels = crop_to_object(target, image, 1, padding=0.5)
    assert cropped.labels.tolist() == [4]
    assert cropped.annotation_ids.tolist() == [51]
    assert cropped.areas.tolist() == [11]
    assert cropped.iscrowd.tolist() == [False]
    # The pixels at the labels are those that lay there in the image.
    x0, y0, x1, y1 = cropped.boxes_xyxy[0].astype(int)
    np.testing.assert_array_equal(pixels[y0:y1, x0:x1], image[30:45, 40:60])
    (a, b) = cropped.keypoints[0]
    np.testing.assert_array_equal(pixels[int(a[1]), int(a[0])], image[30, 40])
    np.testing.assert_array_equal(pixels[int(b[1]), int(b[0])], image[44, 59])
    assert [a[2], b[2]] == [2, 1]
    # Half of the box's size is kept on each side, but nothing beyond the image.
    assert 28 <= pixels.shape[0] <= 34
    assert 38 <= pixels.shape[1] <= 44
    assert crop_to_object(target, image, 0, padding=0.5)[1].shape[0] <= 16


def test_colours_change_as_asked_and_by_the_seed():
    image = np.random.default_rng(0).integers(60, 150, (8, 9, 3)).astype(np.uint8)
    changed = lambda seed=0, **settings: color_jitter(image, AugmentConfig(**settings), np.random.default_rng(seed))  # noqa: E731
    np.testing.assert_array_equal(changed(), image)
    np.testing.assert_array_equal(changed(brightness=0.5, enabled=False), image)
    np.testing.assert_array_equal(changed(brightness=0.5), changed(brightness=0.5))
    different = [changed(seed, brightness=0.5).astype(float) for seed in range(8)]
    assert len({each.tobytes() for each in different}) == 8
    # Brightness multiplies all values alike, saturation keeps grey, and hue keeps the largest channel's value.
    for each in different:
        ratios = each / image
        assert ratios.max() - ratios.min() < 0.05
    grey = np.full((4, 4, 3), 90, np.uint8)
    for kept in ({"saturation": 0.5}, {"hue": 0.5}):
        np.testing.assert_array_equal(color_jitter(grey, AugmentConfig(**kept), new_rng()), grey)
        assert (changed(**kept) != image).any()
    assert np.std(changed(contrast=0.9).astype(float)) != pytest.approx(np.std(image), abs=0.5)


NAMES = ("nose", "left_hand", "right_hand")


def keypoint_sample(label=7, **augment):
    """The points that a sample teaches about a person 64 pixels wide and high, by name, as x and y."""
    category = Category(7, 7, "person", NAMES)
    vocab = Vocab(num_bins=65, size=1065)
    task = Keypoint(KeypointConfig(crop=False, mask_inputs=False), vocab, (replace(category, label=2), category))
    classes = ClassMap((category,), (replace(category, label=label),))
    maker = SampleMaker((category,), [task], size=(64, 64), augment=AugmentConfig(**augment), classes=classes)
    target = target_of(
        [[0, 0, 64, 64]], width=64, height=64, labels=[7], keypoints=[[[32, 5, 2], [10, 20, 2], [50, 30, 1]]]
    )
    image = np.zeros((64, 64, 3), np.uint8)
    (example,) = maker.sample(maker.target(target), image, None, new_rng(), [new_rng()]).examples["keypoint"]
    assert example.prompt[-1] == 100 + label
    pairs = (example.targets - vocab.coord_base).reshape(-1, 2)
    return {name: (int(x), int(y)) for name, (y, x) in zip(NAMES, pairs, strict=True)}


@pytest.mark.parametrize("label", [7, 2], ids=["own labels", "labels of the model"])
def test_a_mirrored_sample_calls_the_left_hand_right(label):
    settings = {"scale_min": 1.0, "scale_max": 1.0}
    plain = keypoint_sample(label, flip=0.0, **settings)
    assert plain == {"nose": (32, 5), "left_hand": (10, 20), "right_hand": (50, 30)}
    mirrored = keypoint_sample(label, flip=1.0, **settings)
    assert mirrored == {"nose": (32, 5), "left_hand": (14, 30), "right_hand": (54, 20)}

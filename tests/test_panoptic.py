"""Panoptic quality and mean IoU: by hand, and against a second implementation that goes pixel by pixel."""

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pix2seq.data.dataset import open_dataset
from pix2seq.data.shapes import write_shapes
from pix2seq.data.shapes.scene import STUFF
from pix2seq.data.shapes.truth import is_true_of
from pix2seq.geometry.polygons import rasterize
from pix2seq.metrics.coco_ap import average_precision
from pix2seq.metrics.panoptic import PanopticQuality, Segment
from pix2seq.types import Category, Instance

CAT, DOG, SKY = 1, 2, 9


def mask(*rows: str) -> np.ndarray:
    return np.array([[character == "#" for character in row] for row in rows])


def scores(truths: Sequence[Segment], found: Sequence[Segment], stuff: Sequence[int] = ()) -> dict[str, float | None]:
    quality = PanopticQuality([CAT, DOG, SKY], stuff)
    quality.add(truths, found)
    return quality.result()


def test_two_right_one_missed_and_one_wrong_by_hand():
    truths = [
        Segment(mask("####....", "####...."), CAT),
        Segment(mask("....##..", "....##.."), CAT),
        Segment(mask("......##", "......##"), DOG),
    ]
    found = [
        Segment(mask("####....", "##......"), CAT),  # 6 of 8 pixels: IoU 0.75
        Segment(mask("......##", "......##"), CAT),  # the dog's place: wrong, and the dog is missed
    ]
    # Cats: one right of IoU 0.75, one missed, one wrong: PQ 0.75 / (1 + 0.5 + 0.5). Dogs: 0.
    # Pixels of cats: 6 common, 12 true, 10 found; of dogs: none common.
    expected = {"PQ": (0.75 / 2 + 0) / 2, "SQ": 0.75, "RQ": (1 / 2 + 0) / 2, "mIoU": (6 / 16 + 0) / 2}
    assert scores(truths, found) == pytest.approx(expected)


def test_things_lie_on_stuff_and_the_first_of_two_things_on_top():
    truths = [Segment(mask("..##"), CAT), Segment(mask("####"), SKY)]
    found = [Segment(mask("####"), SKY), Segment(mask("..##"), CAT), Segment(mask(".###"), DOG)]
    # The dog keeps one of three pixels and is dropped, so nothing is wrong.
    assert scores(truths, found, [SKY]) == {
        "PQ": 1.0,
        "SQ": 1.0,
        "RQ": 1.0,
        "PQ_things": 1.0,
        "PQ_stuff": 1.0,
        "mIoU": 1.0,
    }
    assert scores(truths, [found[2], *found[:2]], [SKY])["PQ_things"] == 0.0  # the dog on top: cat dropped


def test_parts_of_stuff_are_one_segment():
    truths = [Segment(mask("##..##"), SKY), Segment(mask("..##.."), CAT)]
    parts = [Segment(mask("##...."), SKY), Segment(mask("....##"), SKY)]
    assert scores(truths, parts, [SKY])["PQ_stuff"] == 1.0
    assert scores(truths, parts)["PQ"] == 0.0  # of things, neither half has more than half


def test_void_and_crowds():
    covered, beside = Segment(mask("###..."), CAT), Segment(mask("...###"), CAT)
    truths = [Segment(mask("###..."), CAT)]
    # Without stuff, the second cat is wrong; with it, its place is void.
    assert scores(truths, [covered, beside])["PQ"] == pytest.approx(1 / 1.5)
    assert scores(truths, [covered, beside], [SKY])["PQ"] == 1.0
    crowd = Segment(mask("...###"), CAT, is_crowd=True)
    assert scores([*truths, crowd], [covered, beside])["PQ"] == 1.0
    other = Segment(mask("...###"), DOG, is_crowd=True)
    assert scores([*truths, other], [covered, beside])["PQ"] == pytest.approx(1 / 1.5)
    # A crowd is no object that could be missed.
    assert scores([*truths, crowd], [covered])["PQ"] == 1.0


def test_nothing_to_be_found_has_no_score():
    assert set(scores([], []).values()) == {None}
    assert scores([], [Segment(mask("##"), CAT)])["PQ"] == 0.0


@st.composite
def segments(draw: st.DrawFn, crowds: bool) -> list[Segment]:
    found = []
    for _ in range(draw(st.integers(0, 5))):
        top, left = draw(st.integers(0, 5)), draw(st.integers(0, 7))
        area = np.zeros((6, 8), np.bool_)
        area[top : top + draw(st.integers(1, 5)), left : left + draw(st.integers(1, 6))] = True
        found.append(Segment(area, draw(st.sampled_from([CAT, DOG, SKY])), crowds and draw(st.integers(0, 4)) == 0))
    return found


def paint(segments: Sequence[Segment], stuff: Sequence[int], min_left: float) -> dict[tuple[int, int], tuple[int, int]]:
    """Return class and number of each covered pixel."""
    owner: dict[tuple[int, int], tuple[int, int]] = {}
    for is_stuff in (False, True):
        for number, segment in enumerate(segments):
            if (segment.class_id in stuff) != is_stuff:
                continue
            pixels = [tuple(pixel) for pixel in np.argwhere(segment.mask).tolist()]
            free = [pixel for pixel in pixels if pixel not in owner]
            if is_stuff or len(free) >= min_left * len(pixels):
                owner |= dict.fromkeys(free, (segment.class_id, -1 if is_stuff else number))
    return owner


def slow(truths: Sequence[Segment], found: Sequence[Segment], stuff: Sequence[int]) -> dict[str, float]:
    owners = paint([s for s in truths if not s.is_crowd], stuff, 0.0), paint(found, stuff, 0.5)
    everywhere = [(row, column) for row in range(6) for column in range(8)]
    crowd = {
        p: {s.class_id for s in truths if s.is_crowd and s.mask[p]} if p not in owners[0] else set() for p in everywhere
    }
    void = {p for p in everywhere if stuff and p not in owners[0] and not crowd[p]}
    areas = [
        {key: {p for p, other in owner.items() if other == key} for key in set(owner.values())} for owner in owners
    ]
    per_class = {}
    for class_id in (CAT, DOG, SKY):
        mine = [{k: v for k, v in area.items() if k[0] == class_id} for area in areas]
        ious = []
        left = dict(mine[1])
        for pixels in mine[0].values():
            for key, others in mine[1].items():
                iou = len(pixels & others) / len((pixels | others) - (others & void))
                if iou > 0.5:
                    ious.append(iou)
                    left.pop(key)
        wrong = sum(
            sum(p in void or class_id in crowd[p] for p in pixels) <= len(pixels) / 2 for pixels in left.values()
        )
        missed = len(mine[0]) - len(ious)
        if ious or wrong or missed:
            per_class[class_id] = sum(ious) / (len(ious) + wrong / 2 + missed / 2)
    unions, commons = {}, {}
    for p in everywhere:
        if p in void or crowd[p]:
            continue
        true, seen = owners[0].get(p, (0,))[0], owners[1].get(p, (0,))[0]
        for class_id in {true, seen} - {0}:
            unions[class_id] = unions.get(class_id, 0) + 1
            commons[class_id] = commons.get(class_id, 0) + (true == seen)
    mean = lambda values: sum(values) / len(values) if values else None  # noqa: E731
    return {"PQ": mean(list(per_class.values())), "mIoU": mean([commons[k] / n for k, n in unions.items()])}


@settings(max_examples=300)
@given(segments(crowds=True), segments(crowds=False), st.sampled_from([(), (SKY,)]))
def test_it_equals_going_pixel_by_pixel(truths, found, stuff):
    fast = scores(truths, found, stuff)
    for name, value in slow(truths, found, stuff).items():
        assert fast[name] == (None if value is None else pytest.approx(value))


@pytest.fixture(scope="module")
def landscapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stuff") / "data"
    write_shapes(folder, num_train=0, num_val=12, size=96, seed=3, stuff=True)
    return open_dataset(folder, "val")


def test_stuff_covers_a_generated_image(landscapes):
    labels = {c.name: c.label for c in landscapes.categories if c.is_stuff}
    assert set(labels) == set(STUFF)
    for target in (landscapes.target(index) for index in range(len(landscapes))):
        found = {int(label): i for i, label in enumerate(target.labels)}
        sky, ground = (rasterize(target.segmentations[found[labels[name]]], 96, 96) for name in ("sky", "ground"))
        assert np.count_nonzero(sky | ground) == 96 * 96
        assert np.count_nonzero(sky & ground) <= 96  # pixels on the horizon at most
        assert sky[0].all()
        assert ground[-1].all()
        assert target.areas.sum() >= 96 * 96 - 1


def test_captions_of_images_with_stuff_are_true_of_their_figures(landscapes):
    names = {category.label: category.name for category in landscapes.categories}
    targets = [landscapes.target(index) for index in range(len(landscapes))]
    assert all(is_true_of(text, target, names=names) for target in targets for text in target.captions)
    assert not any(is_true_of("A picture of a sky.", target, names=names) for target in targets)


def test_true_masks_have_the_best_quality_and_lost_sky_is_missed(landscapes):
    names = {category.label: category for category in landscapes.categories}
    targets = [landscapes.target(index) for index in range(len(landscapes))]
    found = {
        target.image.id: [
            Instance(tuple(box), names[label], 0.9, polygons=rings)
            for box, label, rings in zip(
                target.boxes_xyxy.tolist(), target.labels.tolist(), target.segmentations, strict=True
            )
        ]
        for target in targets
    }
    perfect = average_precision(targets, landscapes.categories, found, kind="mask").metrics
    assert {perfect[name] for name in ("PQ", "SQ", "RQ", "PQ_things", "PQ_stuff", "mIoU")} == {1.0}
    blind = {key: [each for each in some if each.category.name != "sky"] for key, some in found.items()}
    scored = average_precision(targets, landscapes.categories, blind, kind="mask").metrics
    assert scored["PQ_stuff"] == pytest.approx(0.5)
    assert scored["PQ_things"] == 1.0


def test_a_class_says_whether_it_is_stuff():
    sky = Category(3, 40, "sky", is_stuff=True)
    assert Category.from_json(sky.to_json()) == sky
    assert "is_stuff" not in Category(1, 1, "cat").to_json()
    with pytest.raises(ValueError, match="is_stuff of 'sky' must be true or false"):
        Category.from_json(sky.to_json() | {"is_stuff": "yes"})

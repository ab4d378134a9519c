"""Annotated images: something is drawn, where it should be, and nothing makes it fail."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pix2seq.drawing import category_color, draw_instances, tile
from pix2seq.types import Category, Instance

GREY = np.full((600, 800, 3), 120, np.uint8)
POINTS = np.array([[300, 300, 2], [320, 330, 1], [0, 0, 0]], np.float32)
CAT = Category(1, 1, "cat", ("a", "b", "c"), ((0, 1), (1, 2)))


def test_a_box_is_drawn_on_its_edges_and_nowhere_else():
    drawn = np.asarray(draw_instances(GREY, [Instance((200, 200, 400, 500), CAT, 0.9)]))
    changed = (drawn != 120).any(axis=2)
    assert tuple(drawn[400, 200]) == category_color("cat")
    assert tuple(drawn[499, 300]) == category_color("cat")
    assert not changed[250:480, 220:380].any()
    assert not changed[520:].any()
    assert changed[170:200, 200:260].any()  # the label, above the box


def test_scores_below_the_least_are_left_out():
    drawn = np.asarray(draw_instances(GREY, [Instance((200, 200, 400, 500), CAT, 0.2)], min_score=0.3))
    assert (drawn == 120).all()


def test_small_images_are_enlarged_and_large_ones_are_not():
    assert draw_instances(np.zeros((32, 16, 3), np.uint8), []).size == (256, 512)
    assert draw_instances(GREY, []).size == (800, 600)
    captioned = draw_instances(GREY, [], caption="a long caption " * 20)
    assert captioned.size[0] == 800
    assert captioned.size[1] > 640


def test_a_class_keeps_its_colour():
    assert category_color("person") == category_color("person")
    assert len({category_color(name) for name in ("cat", "dog", "person", "car")}) == 4


@given(
    st.tuples(*[st.floats(-50, 900, width=32)] * 4),
    st.sampled_from(["cat", "Hündchen", "猫", ""]),
    st.sampled_from([(1, 1), (3, 700), (64, 64)]),
)
def test_nothing_makes_drawing_fail(box, name, size):
    instance = Instance(
        box, Category(1, 1, name, ("a", "b", "c"), ((0, 1),)), 0.5, [np.array([[0, 0], [5, 0], [np.nan, 5]])], POINTS
    )
    assert max(draw_instances(np.zeros((*size, 3), np.uint8), [instance]).size) >= 512


def test_images_are_tiled_row_by_row():
    sheet = tile([draw_instances(GREY, [])] * 5, columns=2, gap=10)
    assert sheet.size == (1610, 1820)
    with pytest.raises(ValueError, match="empty"):
        tile([], columns=2)

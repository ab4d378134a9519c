"""Clicks over HTTP: the predictor's own answers, images that are kept within bounds, one line for all else."""

import json

import numpy as np
import pytest
import torch
from click_model import untrained_predictor
from hypothesis import given
from hypothesis import strategies as st
from random_model import OLD
from web_client import encoded, form, get, noise, png_header, predict, request, serving

from pix2seq import Predictor
from pix2seq.errors import InputError
from pix2seq.tasks.request import EncodedImage
from pix2seq.types import ObjectMask
from pix2seq.web.images import KeptImages, NotKeptError, num_bytes
from pix2seq.web.limits import Limits

PIXELS = noise(60, 40)
IMAGE = encoded(PIXELS)
LIMITS = Limits(max_bytes=200_000, max_pixels=10_000, timeout=30, max_kept_images=2)


@pytest.fixture(scope="module")
def predictor():
    return untrained_predictor(varied=True)


@pytest.fixture(scope="module")
def port(predictor):
    with serving(predictor, limits=LIMITS) as port:
        yield port


def send(port, image):
    return request(port, "POST", "/images", *form(image, {}))


def click(port, **question):
    body = json.dumps({"task": "prompted"} | question).encode()
    return request(port, "POST", "/clicks", body, {"Content-Type": "application/json"})


def plain(masks):
    return json.loads(json.dumps([mask.to_json() for mask in masks]))


def test_clicks_are_answered_as_by_the_predictor(predictor, port):
    kept = send(port, IMAGE).json
    assert (kept["width"], kept["height"]) == (60, 40)
    image = predictor.encode(PIXELS)
    for seed in (0, 7):
        expected = predictor.click(image, [(30, 20), (5, 6)], [1, 0], [2, 2, 50, 38], seed=seed)
        question = {"points": [[30, 20], [5, 6]], "labels": [True, False], "box": [2, 2, 50, 38], "seed": seed}
        reply = click(port, image=kept["id"], **question)
        assert reply.status == 200
        assert reply.json == {"masks": plain(expected)}
        assert reply.json["masks"]
    one = click(port, image=kept["id"], points=[[30, 20]], num_candidates=1).json["masks"]
    assert one == plain(predictor.click(image, [(30, 20)], num_candidates=1))
    assert click(port, image=kept["id"]).json["masks"] == plain(predictor.everything(image))


def test_a_series_of_clicks_is_answered_as_by_a_session(predictor, port):
    image_id = send(port, IMAGE).json["id"]
    session = predictor.session(PIXELS)
    points, labels, previous = [], [], []
    for x, y, positive in [(30, 20, True), (10.5, 8.25, False), (50, 30, True)]:
        expected = session.add(x, y, positive)
        points, labels = [*points, [x, y]], [*labels, positive]
        masks = click(port, image=image_id, points=points, labels=labels, previous=previous).json["masks"]
        assert masks == plain(expected)
        # What the browser has are rounded pixels, so the session goes on from those too.
        previous = masks[0]["segmentation"]
        rings = [np.array(ring, np.float32).reshape(-1, 2) for ring in previous]
        clicks, _, chosen = session._steps[-1]
        session._steps[-1] = (clicks, [ObjectMask((0, 0, 1, 1), rings, 1.0)], chosen)


def test_an_image_is_encoded_once(predictor, monkeypatch):
    with serving(predictor, limits=LIMITS) as port:
        counted = []
        original = Predictor.encode
        monkeypatch.setattr(Predictor, "encode", lambda *args: counted.append(1) or original(*args))
        image_id = send(port, IMAGE).json["id"]
        monkeypatch.setattr(Predictor, "_encode_pixels", None)  # whatever encodes now is an error
        assert send(port, IMAGE).json["id"] == image_id
        assert [click(port, image=image_id, points=[[x, 5]]).status for x in (1, 20, 40)] == [200] * 3
    assert counted == [1]


def test_an_image_that_had_to_go_is_sent_again(port):
    ids = [send(port, encoded(noise(60, 40, seed))).json["id"] for seed in (1, 2)]
    before = click(port, image=ids[0], points=[[30, 20]]).json
    third = send(port, IMAGE).json["id"]
    assert click(port, image=ids[0], points=[[30, 20]]).json == before  # it was used later than the other
    message = "the image is not kept, or not any more; send it to /images again"
    assert click(port, image=ids[1], points=[[30, 20]]).error(410) == message
    assert click(port, image=third, points=[[30, 20]]).status == 200
    assert click(port, image=ids[0], points=[[30, 20]]).status == 200
    send(port, encoded(noise(60, 40, 2)))
    assert click(port, image=third, points=[[30, 20]]).error(410)
    assert send(port, encoded(noise(60, 40, 1))).json["id"] == ids[0]
    assert click(port, image=ids[0], points=[[30, 20]]).json == before


def image_of(num_numbers):
    memory = torch.zeros(1, num_numbers)
    return EncodedImage(memory, np.zeros((1, 1, 3), np.uint8), (1, 1), (torch.zeros(2, dtype=torch.bfloat16),))


@given(
    st.integers(1, 4),
    st.integers(0, 600),
    st.lists(
        st.tuples(st.sampled_from(["add", "get"]), st.sampled_from("abcd"), st.integers(0, 40)), min_size=5, max_size=30
    ),
)
def test_the_images_that_were_used_last_are_kept_within_bounds(max_images, max_bytes, steps):
    kept, model = KeptImages(max_images, max_bytes), []  # pairs of name and bytes, the last one used last
    for action, name, size in steps:
        known = dict(model)
        if action == "add":
            model = [pair for pair in model if pair[0] != name] + [(name, 4 * size + 3 + 4)]
            while len(model) > 1 and (len(model) > max_images or sum(n for _, n in model) > max_bytes):
                model = model[1:]
            kept.add(name, image_of(size))
        elif name in known:
            model = [pair for pair in model if pair[0] != name] + [(name, known[name])]
            assert num_bytes(kept.get(name)) == known[name]
        else:
            with pytest.raises(NotKeptError, match="send it to /images again"):
                kept.get(name)
        assert [each in kept for each in "abcd"] == [each in dict(model) for each in "abcd"]
        assert len(kept) == len(model)
        assert kept.num_bytes == sum(n for _, n in model)


POINT = {"points": [[1, 1]]}
BAD = {
    "no click": ({"points": []}, "there is no click and no box"),
    "a point outside": ({"points": [[61, 1]]}, "inside the image of 60 x 40"),
    "a point that is no number": ({"points": [["a", 1]]}, "points.0.0: "),
    "a point that is not finite": ({"points": [[float("nan"), 1]]}, "points.0.0: "),
    "half a point": ({"points": [[1]]}, "points.0.1: Field required"),
    "too many points": ({"points": [[1, 1]] * 7}, "at most 6"),
    "far too many points": ({"points": [[1, 1]] * 10_001}, "at most 10000"),
    "a label too many": (POINT | {"labels": [True, True]}, "1 points were given with 2 labels"),
    "a box without area": ({"box": [5, 5, 5, 9]}, "x1 > x0"),
    "a previous point alone": (POINT | {"previous": [[1, 2]]}, "at least 3 points"),
    "an odd polygon": (POINT | {"previous": [[1, 2, 3, 4, 5, 6, 7]]}, "x, y, x, y"),
    "a polygon that is not finite": (POINT | {"previous": [[float("inf"), 2, 3, 4, 5, 6]]}, "previous.0.0: "),
    "long polygons": (POINT | {"previous": [[1, 2] * 5_001] * 2}, "at most 10000 points together"),
    "no candidates": (POINT | {"num_candidates": 0}, "num_candidates: "),
    "a seed": (POINT | {"seed": -1}, "seed: "),
    "an unknown field": (POINT | {"point": 1}, "point: Extra inputs"),
    "an unknown task": (POINT | {"task": "detection"}, "not trained for detection"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_questions_get_one_line(case, port):
    question, message = BAD[case]
    image_id = send(port, IMAGE).json["id"]
    assert message in click(port, image=image_id, **question).error(422)
    assert click(port, image=image_id, **POINT).status == 200


def test_other_bad_requests_get_one_line(port):
    headers = {"Content-Type": "application/json"}
    assert request(port, "POST", "/clicks", b"{", headers).error(422)
    assert request(port, "POST", "/clicks", b"[" * 50_000, headers).error(400)
    assert request(port, "POST", "/clicks", b"[]", headers).error(422)
    assert "larger than 200000 bytes" in click(port, image="0" * 200_001).error(413)
    assert "10000" in send(port, png_header(101, 100)).error(413)
    assert "not a readable image" in send(port, b"").error(415)
    assert send(port, None).error(422) == "image: Field required; see /openapi.json"
    assert click(port, image="unknown", **POINT).error(410)


def test_polygons_far_outside_the_image_are_no_error(port):
    image_id = send(port, IMAGE).json["id"]
    for far in (1e6, -1e30, 1e300):
        reply = click(port, image=image_id, **POINT, previous=[[far, 2, 3, far, 5, 6]])
        assert reply.status == 200, reply.body


def test_tasks_say_whether_they_take_clicks(predictor, port):
    assert [task["takes_clicks"] for task in get(port, "/tasks").json["tasks"]] == [True]
    assert predict(port, IMAGE, tasks="prompted", about="30,20").status == 200
    with serving(Predictor.from_pretrained(OLD), limits=LIMITS) as other:
        assert not any(task["takes_clicks"] for task in get(other, "/tasks").json["tasks"])
        image_id = send(other, IMAGE).json["id"]
        assert "takes no clicks" in click(other, image=image_id, task="detection", **POINT).error(422)


def test_a_polygon_that_is_none_is_refused_before_the_model_is_asked(predictor):
    for ring in (np.zeros((2, 2)), np.zeros((3, 3)), np.full((3, 2), np.nan)):
        with pytest.raises(InputError, match="previous polygon"):
            predictor.click(PIXELS, [(1, 1)], previous=ObjectMask((0, 0, 1, 1), [ring], 1.0))

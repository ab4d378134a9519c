"""Searching a folder and finding objects over HTTP: the same answers as in Python, and nothing outside the folder."""

import base64
import io
import json

import numpy as np
import pytest
from colours import find, seeing_colours
from example_model import untrained_predictor
from PIL import Image
from random_model import OLD, random_model
from web_client import encoded, form, get, noise, predict, request, serving

from pix2seq import Predictor
from pix2seq.cli import main
from pix2seq.search import open_index, search, update_index
from pix2seq.web.limits import Limits

LIMITS = Limits(max_bytes=200_000, max_pixels=10_000, max_kept_images=2)


def scene(*boxes, size=(40, 30)):
    """A black image with boxes of a colour (colour, x0, y0, x1, y1)."""
    pixels = np.zeros((size[1], size[0], 3), np.uint8)
    for colour, x0, y0, x1, y1 in boxes:
        pixels[y0:y1, x0:x1] = colour
    return pixels


RED, BLUE = (255, 0, 0), (0, 0, 255)


@pytest.fixture(scope="module", autouse=True)
def colours():
    with seeing_colours():
        yield


@pytest.fixture(scope="module")
def predictor():
    return Predictor(random_model())


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Three images in the folder, and a link to one that lies outside."""
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    outside = tmp_path_factory.mktemp("outside")
    images = {
        "red.png": scene((RED, 0, 0, 40, 30)),
        "more/half.png": scene((RED, 0, 0, 20, 30)),
        "blue.png": scene((BLUE, 0, 0, 40, 30)),
        "large.png": scene((BLUE, 0, 0, 99, 30), size=(300, 200)),
    }
    for name, pixels in images.items():
        (folder / name).write_bytes(encoded(pixels))
    (outside / "secret.png").write_bytes(encoded(scene((RED, 0, 0, 40, 29))))
    (folder / "link.png").symlink_to(outside / "secret.png")
    return folder


@pytest.fixture(scope="module")
def index(predictor, photos, tmp_path_factory):
    index = open_index(tmp_path_factory.mktemp("index"), photos, checkpoint=OLD, model="m")
    update_index(predictor, index)
    return index


@pytest.fixture(scope="module")
def port(predictor, index):
    with serving(predictor, limits=LIMITS, index=index) as port:
        yield port


def ask(port, image=None, **fields):
    return request(port, "POST", "/search", *form(image, fields))


def wanted(port, **question):
    return request(port, "POST", "/find", json.dumps(question).encode(), {"Content-Type": "application/json"})


def keep(port, pixels):
    reply = request(port, "POST", "/images", *form(encoded(pixels), {}))
    assert reply.status == 200, reply.body
    return reply.json["id"]


def test_a_search_answers_as_in_python_with_thumbnails_and_addresses(predictor, index, photos, port):
    for fields, options in (
        ({"text": "red"}, {"sentence": "red", "top": 24}),
        ({"text": "red", "top": 2}, {"sentence": "red", "top": 2}),
        ({"text": "red", "match": "false"}, {"sentence": "red", "top": 24, "match": False}),
    ):
        results = ask(port, **fields).json["results"]
        hits = search(predictor, index, **options)
        plain = [{key: value for key, value in each.items() if key not in ("url", "thumbnail")} for each in results]
        assert plain == json.loads(json.dumps([hit.to_json() for hit in hits]))
    results = {each["file"]: each for each in ask(port, text="red").json["results"]}
    assert list(results)[:1] == ["red.png"]
    for name in ("red.png", "more/half.png"):
        assert get(port, results[name]["url"]).body == (photos / name).read_bytes()
        kind, content = results[name]["thumbnail"].split(",")
        assert kind == "data:image/jpeg;base64"
        small = np.asarray(Image.open(io.BytesIO(base64.b64decode(content)))).astype(int)
        truth = np.asarray(Image.open(photos / name)).astype(int)
        assert np.abs(small - truth).mean() < 15
    by_image = ask(port, encoded(scene((BLUE, 0, 0, 40, 30))), top=1).json["results"]
    assert [each["file"] for each in by_image] == ["blue.png"]


def test_nothing_outside_the_folder_is_served(port, index):
    results = {each["file"]: each for each in ask(port, text="red").json["results"]}
    assert results["link.png"]["thumbnail"] is None
    assert "link out of the folder" in get(port, results["link.png"]["url"]).error(404)
    for path in ("/indexed/99", "/indexed/-1", "/indexed/..%2F..%2Findex.json", "/indexed/red.png", "/indexed/"):
        assert get(port, path).status in (404, 422)


def test_only_images_are_served(predictor, photos, tmp_path, port):
    (tmp_path / "photos").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "photos" / name).write_bytes((photos / "red.png").read_bytes())
    index = open_index(tmp_path / "index", tmp_path / "photos", checkpoint=OLD, model="m")
    update_index(predictor, index)
    (tmp_path / "photos" / "a.png").write_bytes(b"a password")
    with serving(predictor, limits=LIMITS, index=index) as other:
        assert "not a readable image" in get(other, "/indexed/0").error(415)
        assert get(other, "/indexed/1").headers["content-type"] == "image/png"
        (tmp_path / "photos" / "b.png").unlink()
        assert "does not exist" in get(other, "/indexed/1").error(422)
        assert ask(other, text="red").json["results"] == []


def test_an_image_beyond_the_limit_has_no_thumbnail(port):
    results = {each["file"]: each for each in ask(port, text="blue").json["results"]}
    assert results["large.png"]["thumbnail"] is None
    assert results["blue.png"]["thumbnail"] is not None


BAD = {
    "nothing": ({}, 422, "either a sentence or an image"),
    "spaces": ({"text": " \n"}, 422, "either a sentence or an image"),
    "too long": ({"text": "x" * 1001}, 422, "text: "),
    "too many": ({"text": "red", "top": "101"}, 422, "top: "),
    "none": ({"text": "red", "top": "0"}, 422, "top: "),
    "no image": ({"image": b"no image"}, 415, "not a readable image"),
    "both": ({"image": encoded(noise(9, 9)), "text": "red"}, 422, "either a sentence or an image"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_searches_get_one_line(case, port):
    fields, status, message = BAD[case]
    assert message in ask(port, **fields).error(status)


def test_without_an_index_nothing_is_searched(predictor):
    with serving(predictor, limits=LIMITS) as port:
        assert "--index" in ask(port, text="red").error(404)
        assert "searches no folder" in get(port, "/indexed/0").error(404)
        assert get(port, "/tasks").json["index"] is None


def test_the_page_is_told_what_can_be_found_and_searched(predictor, photos, port):
    about = get(port, "/tasks").json
    assert about["index"] == {"folder": photos.name, "num_images": 5}
    assert about["finds"] == {"like": True, "words": True}


def test_objects_are_found_as_in_python(predictor, port):
    image, example = scene((RED, 3, 4, 13, 24), (BLUE, 20, 2, 30, 9)), scene((BLUE, 5, 5, 9, 9), size=(20, 20))
    ids = [keep(port, each) for each in (image, example)]
    box = [5, 5, 9, 9]
    found = wanted(port, image=ids[0], like=[{"image": ids[1], "box": box}]).json
    assert found == {
        "width": 40,
        "height": 30,
        "instances": json.loads(json.dumps(expected(image, like=[(example, box)]))),
    }
    assert found["instances"][0]["bbox"] == [20, 2, 10, 7]
    assert wanted(port, image=ids[0], words="the red one").json["instances"][0]["bbox"] == [3, 4, 10, 20]
    assert wanted(port, image=ids[1], words="the red one").json["instances"] == []


def expected(image, **question):
    return [each.to_json() for each in find(None, image, **question)]


def test_bad_questions_about_objects_get_one_line(port):
    image = keep(port, scene((RED, 3, 4, 13, 24)))
    like = [{"image": image, "box": [3, 4, 13, 24]}]
    assert "give one of them" in wanted(port, image=image).error(422)
    assert "give one of them" in wanted(port, image=image, like=like, words="red").error(422)
    assert "not kept" in wanted(port, image="0" * 64, words="red").error(410)
    assert "not kept" in wanted(port, image=image, like=[{"image": "1" * 64, "box": [0, 0, 1, 1]}]).error(410)
    assert "box" in wanted(port, image=image, like=[{"image": image, "box": [0, 0, 1]}]).error(422)
    assert "extra" in wanted(port, image=image, words="red", more=1).error(422).lower()
    assert wanted(port, image=image, words="red").status == 200


def test_tasks_that_need_a_question_are_not_asked_without_one(predictor, port, monkeypatch):
    image = encoded(noise(20, 20))
    task = predictor.tasks["captioning"]
    monkeypatch.setattr(type(task), "about_format", "sentences")
    assert {each["name"]: each["needs_about"] for each in get(port, "/tasks").json["tasks"]} == {
        "detection": False, "segmentation": False, "keypoint": False, "captioning": True
    }  # fmt: skip
    answer = predict(port, image, sequences=True).json
    assert {each["task"] for each in answer["sequences"]} <= {"detection", "segmentation", "keypoint"}
    assert answer["captions"] == []
    assert predict(port, image, tasks="captioning").json["captions"] != []


def test_an_index_of_another_model_is_not_served(index, tmp_path, capsys):
    assert main(["serve", "--index", str(index.folder), "--port", "0"]) == 2
    assert "written with another model" in capsys.readouterr().err
    assert main(["serve", "--index", str(tmp_path), "--port", "0"]) == 2
    assert "is no index" in capsys.readouterr().err


def test_no_file_of_the_server_is_an_example(photos):
    with serving(untrained_predictor()) as port:
        about = f"{photos / 'red.png'}:0,0,20,20"
        line = predict(port, encoded(noise(20, 20)), tasks="by_example", about=about).error(422)
        assert "by_example is not asked by /predict; keep both images by /images, and ask /find" in line
        nowhere = predict(port, encoded(noise(20, 20)), tasks="by_example", about="/nowhere.png:0,0,20,20").error(422)
        assert nowhere == line  # nothing is told about files

"""The web page in headless Chromium: upload, ask every task, filter, point at tokens and objects, download."""

import json
import re

import pytest
from browser import needs_browser, open_page, requests
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.color import Color
from web_client import serving

from pix2seq import Predictor, demo
from pix2seq.web.examples import example_images

pytestmark = [
    pytest.mark.slow,
    needs_browser,
    pytest.mark.skipif(not (demo.CHECKPOINT / "config.json").is_file(), reason="needs the model of the repository"),
]
SHOWN = 4  # the example with most kinds of answers


@pytest.fixture(scope="module")
def predictor():
    return Predictor.from_pretrained(demo.CHECKPOINT, device="cpu")


@pytest.fixture(scope="module")
def examples(predictor):
    return example_images(predictor, None)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def page(predictor, examples, downloads):
    """A browser that has opened the page; every request that it makes is logged."""
    with serving(predictor, examples=examples) as port, open_page(port, downloads) as page:
        yield page


@pytest.fixture(scope="module")
def uploaded(page, examples, tmp_path_factory):
    """The page after the upload of an image, with what the server answered about it."""
    path = tmp_path_factory.mktemp("images") / "my street.jpg"
    path.write_bytes(examples[SHOWN].content)
    page.until(lambda: "answered in" in page.text("#status"))  # about the first example
    page.one("#file").send_keys(str(path))
    page.until(lambda: page.text("#status").startswith("my street.jpg, 384 x 384 pixels, answered in"))
    return page


@pytest.fixture(scope="module")
def expected(predictor, examples, tmp_path_factory):
    """What the predictor answers about the image."""
    path = tmp_path_factory.mktemp("expected") / "image.jpg"
    path.write_bytes(examples[SHOWN].content)
    return predictor.predict(path, list(predictor.tasks)).to_json()


def test_every_task_is_shown_on_the_image(uploaded, expected, predictor):
    likely = [each for each in expected["instances"] if each["score"] >= 0.3]
    assert {each["category"] for each in likely} >= {"person", "star"}
    boxes = sorted(uploaded.rectangle(box) for box in uploaded.shown("[data-layer=boxes] rect"))
    assert boxes == sorted(each["bbox"] for each in likely)
    assert len(uploaded.shown("[data-layer=masks] path")) == sum(bool(each["segmentation"]) for each in likely)
    points = [point for each in likely for point in each["keypoints"][2::3] if point > 0]
    assert len(uploaded.shown("[data-layer=keypoints] circle")) == len(points) > 10
    assert uploaded.text("#captions") == expected["captions"][0]["text"]
    names = sorted(each.text for each in uploaded.shown("#objects li"))
    assert names == sorted(f"{each['category']} {each['score']:.2f}" for each in likely)
    assert uploaded.texts("#tabs button") == list(predictor.tasks)
    image, overlay = (uploaded.one(f"#stage {each}").rect for each in ("img", "svg"))
    assert overlay == pytest.approx(image, abs=1)
    assert image["width"] > 300


def test_the_slider_filters_without_asking_again(uploaded, expected):
    uploaded.browser.get_log("performance")
    scores = sorted(each["score"] for each in expected["instances"])
    for least in (0.0, scores[len(scores) // 2] - 0.005, 1.0, 0.3):
        least = round(least, 2)
        uploaded.slide(least)
        count = sum(score >= least for score in scores)
        assert len(uploaded.shown("[data-layer=boxes] rect")) == len(uploaded.shown("#objects li")) == count
        assert uploaded.text("#count") == f"{count} of {len(scores)} objects"
        uploaded.tab("detection")
        weak = sum(score < least for score in scores)
        assert len(uploaded.all("#tokens .part.weak")) == weak
    assert requests(uploaded) == []


@pytest.mark.parametrize("layer", ["boxes", "masks", "keypoints", "labels"])
def test_a_layer_is_switched_off_and_on(uploaded, layer):
    drawn = f"[data-layer={layer}] *"
    count = len(uploaded.shown(drawn))
    assert count
    switch = uploaded.one(f"#layers [name={layer}]")
    switch.click()
    assert not uploaded.shown(drawn)
    switch.click()
    assert len(uploaded.shown(drawn)) == count


def test_a_token_shows_its_place_on_the_image(uploaded, expected):
    uploaded.tab("detection")
    best = expected["instances"][0]
    x, y, width, height = best["bbox"]
    row = '#tokens [data-answer="instances/0"] .token'
    for position, (axis, pixel) in enumerate([("y", y), ("x", x), ("y", y + height), ("x", x + width)]):
        uploaded.point(uploaded.all(row)[position])
        line = uploaded.one(f"[data-layer=cue] line.axis-{axis}:not(.shade):not(.other)")
        assert float(line.get_attribute(f"{axis}1")) == float(line.get_attribute(f"{axis}2"))
        assert float(line.get_attribute(f"{axis}1")) == pytest.approx(pixel, abs=2)  # boxes are clipped to the image
        assert f"{axis} = " in uploaded.text("#token")
        assert re.search(r"bin \d+ of 128", uploaded.text("#token"))
        assert len(uploaded.all("[data-layer=boxes] .hot")) == 1
        corner = uploaded.one("[data-layer=cue] circle")
        assert float(corner.get_attribute("cx")) == pytest.approx(x if position < 2 else x + width, abs=2)
        assert float(corner.get_attribute("cy")) == pytest.approx(y if position < 2 else y + height, abs=2)
    uploaded.point(uploaded.all(row)[4])
    assert f"best answer {best['category']} {best.get('raw_score', best['score']):.3f}" in uploaded.text("#token")
    assert not uploaded.all("[data-layer=cue] line")
    uploaded.leave()
    assert not uploaded.all("[data-layer=cue] *")
    assert not uploaded.all("[data-layer=boxes] .hot")


def test_a_token_of_a_mask_shows_the_polygon_so_far_and_its_frame(uploaded):
    uploaded.tab("segmentation")
    tokens = uploaded.all("#tokens .sequence:first-child .part:not(.prompt) .token")
    uploaded.point(tokens[11])
    path = uploaded.one("[data-layer=cue] polyline:not(.shade)").get_attribute("points")
    pixels = [float(number) for number in re.findall(r"-?[\d.]+", path)]
    shown = [int(re.sub(r"\D", "", token.text)) for token in tokens[:12]]
    assert pixels == pytest.approx([shown[i + 1 - 2 * (i % 2)] for i in range(12)], abs=0.51)
    assert uploaded.all("[data-layer=cue] rect.frame")
    uploaded.one("#ids").click()
    ids = [int(token.text) for token in uploaded.all("#tokens .sequence:first-child .token")]
    assert (ids[0], ids[-1]) == (11, 0)  # the task and the end
    uploaded.one("#ids").click()


def test_an_object_shows_its_tokens(uploaded, expected):
    uploaded.tab("segmentation")
    for place in ("#objects li:nth-child(2)", "#stage [data-layer=hits] [data-answer='instances/1']"):
        uploaded.leave()
        uploaded.point(uploaded.one(place))
        answer = "instances/1" if "hits" in place else uploaded.one(place).get_attribute("data-answer")
        rows = uploaded.all("#tokens .part.hot")
        assert {row.get_attribute("data-answer") for row in rows} == {answer}
        assert uploaded.one(f"[data-layer=boxes] [data-answer='{answer}']").get_attribute("class") == "box hot"
    uploaded.leave()
    assert not uploaded.all(".hot")


def test_play_goes_through_the_tokens_in_order(uploaded):
    uploaded.tab("captioning")
    uploaded.one("#play").click()
    seen = []
    while uploaded.text("#play") == "Stop":
        now = uploaded.text("#token")
        if now not in seen:
            seen.append(now)
    numbers = [int(match[1]) for line in seen if (match := re.match(r"token (\d+) of", line))]
    assert len(numbers) > 2
    assert numbers == sorted(numbers)


def test_the_answer_is_downloaded_as_json(uploaded, expected, downloads):
    uploaded.one("#download").click()
    path = downloads / "my street.json"
    uploaded.until(path.exists)
    assert json.loads(path.read_text()) == {"image": "my street.jpg"} | json.loads(json.dumps(expected))


def test_only_the_chosen_tasks_are_asked(uploaded, expected):
    for name in ("segmentation", "keypoint", "captioning"):
        uploaded.one(f"#tasks [name={name}]").click()
    uploaded.until(lambda: uploaded.texts("#tabs button") == ["detection"])
    assert len(uploaded.all("[data-layer=boxes] rect")) == len(expected["instances"])
    assert not uploaded.all("[data-layer=masks] path, [data-layer=keypoints] *, #captions li")
    uploaded.one("#tasks [name=detection]").click()
    uploaded.until(lambda: uploaded.text("#status") == "Choose a task.")
    assert not uploaded.all("[data-layer=boxes] rect")
    uploaded.one("#tasks [name=segmentation]").click()
    uploaded.one("#about input").send_keys("200,100,10,10 person", Keys.ENTER)
    uploaded.until(lambda: "x1 > x0" in uploaded.text("#status"))
    assert uploaded.one("#status").get_attribute("class") == "error"
    uploaded.one("#about input").clear()
    uploaded.one("#about input").send_keys("10,20,100,110 star", Keys.ENTER)
    uploaded.until(lambda: len(uploaded.all("[data-layer=boxes] rect")) == 1)
    assert uploaded.rectangle(uploaded.one("[data-layer=boxes] rect")) == [10, 20, 90, 90]
    uploaded.one("#about input").clear()
    for name in ("detection", "keypoint", "captioning"):
        uploaded.one(f"#tasks [name={name}]").click()


def test_a_class_has_the_colour_that_drawings_have(uploaded):
    from pix2seq.drawing import category_color

    uploaded.until(lambda: uploaded.all("#objects li"))
    item = uploaded.all("#objects li")[0]
    color = Color.from_string(item.value_of_css_property("border-left-color"))
    name = item.get_attribute("textContent").rsplit(" ", 1)[0]
    assert (color.red, color.green, color.blue) == category_color(name)


def test_a_file_that_is_no_image_says_so(uploaded, tmp_path):
    (tmp_path / "notes.txt").write_text("<script>document.title = 'broken'</script>")
    uploaded.one("#file").send_keys(str(tmp_path / "notes.txt"))
    uploaded.until(lambda: "not a readable image" in uploaded.text("#status"))
    assert not uploaded.all("[data-layer=boxes] rect")
    assert uploaded.one("#download").get_attribute("hidden")


def test_the_page_asks_no_other_machine_and_reports_no_error(uploaded):
    addresses = requests(uploaded)
    assert len(addresses) > 2
    assert [each for each in addresses if not re.match(r"(http://127\.0\.0\.1:\d+/|blob:|data:)", each)] == []
    faults = [each for each in uploaded.browser.get_log("browser") if not each["message"].count("/predict")]
    assert faults == []

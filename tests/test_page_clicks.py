"""Clicks on the web page in headless Chromium: add, take away, choose, undo, edit, keep, export."""

import json

import numpy as np
import pytest
from browser import needs_browser, open_page, requests
from click_model import untrained_predictor
from pycocotools.coco import COCO
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from web_client import encoded, noise, serving

from pix2seq.geometry.polygons import rasterize
from pix2seq.types import ObjectMask
from pix2seq.web.examples import ExampleImage
from pix2seq.web.limits import Limits

pytestmark = [pytest.mark.slow, needs_browser]
PIXELS = noise(60, 40)
SEND_OTHER = """
    const done = arguments[0];
    fetch("/examples/1.jpg").then((each) => each.blob()).then((blob) => {
        const form = new FormData();
        form.append("image", blob, "other");
        return fetch("/images", { method: "POST", body: form });
    }).then(() => done());
"""


@pytest.fixture(scope="module")
def predictor():
    return untrained_predictor(varied=True)


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("downloads")


@pytest.fixture(scope="module")
def opened(predictor, downloads):
    examples = [ExampleImage("noise", encoded(PIXELS)), ExampleImage("other", encoded(noise(40, 40, 1)))]
    limits = Limits(max_kept_images=1)
    with serving(predictor, examples=examples, limits=limits) as port, open_page(port, downloads) as page:
        page.until(lambda: page.browser.execute_script("return document.body.dataset.ready !== undefined"))
        yield page


@pytest.fixture
def page(opened):
    """The page with its first example, without clicks."""
    opened.all("#examples button")[0].click()
    opened.until(lambda: opened.all("#undo:disabled") and not opened.all("[data-layer=clicks] *"))
    return opened


def press(page, x, y, *, right=False, alt=False):
    """Click at x, y in pixels of the image; return where it was after rounding to pixels of the screen."""
    count = len(page.all(".click"))
    page.browser.execute_script("window.scrollTo(0, 0)")
    stage = page.one("#stage svg")
    scale = stage.rect["width"] / 60
    actions = ActionChains(page.browser).move_to_element_with_offset(
        stage, round((x - 30) * scale), round((y - 20) * scale)
    )
    if alt:
        actions.key_down(Keys.ALT)
    actions = actions.context_click() if right else actions.click()
    actions.perform()
    if alt:
        ActionChains(page.browser).key_up(Keys.ALT).perform()
    page.until(lambda: len(page.all(".click")) == count + 1)
    idle(page)
    last = page.all(".click")[-1]
    return float(last.get_attribute("cx")), float(last.get_attribute("cy"))


def idle(page):
    """Wait for all that was asked for."""
    page.until(lambda: page.one("#clicks").get_attribute("aria-busy") != "true")


def key(page, name):
    ActionChains(page.browser).send_keys(name).perform()
    idle(page)


def shown(page):
    """The polygons of the mask that is being clicked."""
    paths = page.all("[data-layer=clicks] .chosen")
    if not paths:
        return []
    rings = paths[0].get_attribute("d").strip("MZ").split("ZM")
    return [[float(value) for value in ring.split()] for ring in rings]


def plain(masks):
    return [json.loads(json.dumps(mask.to_json())) for mask in masks]


def as_previous(polygons):
    return ObjectMask((0, 0, 1, 1), [np.array(ring, np.float32).reshape(-1, 2) for ring in polygons], 1.0)


def downloaded(page, downloads, link, name):
    (downloads / name).unlink(missing_ok=True)
    page.one(link).click()
    page.until((downloads / name).exists)
    return json.loads((downloads / name).read_text())


def test_clicks_add_and_take_away_and_are_taken_back(page, predictor):
    first = press(page, 30, 20)
    assert first == pytest.approx((30, 20), abs=0.2)
    candidates = plain(predictor.click(PIXELS, [first]))
    assert len(candidates) > 1
    assert shown(page) == candidates[0]["segmentation"]
    scores = [f"{i} {mask['score']:.2f}" for i, mask in enumerate(candidates, start=1)]
    assert page.texts("#candidates button") == scores
    points, labels, masks = [first], [1], [candidates[0]["segmentation"]]
    for x, y, how in [(10, 8, {"right": True}), (50, 30, {}), (20, 33, {"alt": True})]:
        points.append(press(page, x, y, **how))
        labels.append(0 if how else 1)
        expected = plain(predictor.click(PIXELS, points, labels, previous=as_previous(masks[-1])))
        masks.append(expected[0]["segmentation"])
        assert shown(page) == masks[-1]
    signs = [each.get_attribute("class") for each in page.all(".click")]
    assert signs == ["click positive", "click negative", "click positive", "click negative"]
    for left, how in ((3, "key"), (2, "button"), (1, "key")):
        key(page, "z") if how == "key" else page.one("#undo").click()
        idle(page)
        assert len(page.all(".click")) == left
        assert shown(page) == masks[left - 1]
    key(page, Keys.ESCAPE)
    assert not page.all("[data-layer=clicks] *")
    key(page, "z")  # also the reset
    assert shown(page) == masks[0]


def test_a_candidate_is_chosen_by_its_number_or_a_click(page, predictor):
    first = press(page, 30, 20)
    candidates = plain(predictor.click(PIXELS, [first]))
    key(page, "2")
    assert shown(page) == candidates[1]["segmentation"]
    assert page.all("#candidates button")[1].get_attribute("aria-pressed") == "true"
    key(page, "9")  # there is none
    assert shown(page) == candidates[1]["segmentation"]
    second = press(page, 12, 30)
    previous = as_previous(candidates[1]["segmentation"])
    assert shown(page) == plain(predictor.click(PIXELS, [first, second], previous=previous))[0]["segmentation"]
    key(page, "zz")
    page.point(page.all("#candidates button")[1])
    assert shown(page) == candidates[1]["segmentation"]  # while it is pointed at
    page.leave()
    assert shown(page) == candidates[0]["segmentation"]
    page.all("#candidates button")[1].click()
    idle(page)
    page.leave()
    assert shown(page) == candidates[1]["segmentation"]


def test_a_polygon_is_edited_and_the_next_click_goes_on_from_it(page, predictor, downloads):
    first = press(page, 30, 20)
    before = shown(page)
    assert not page.all(".handle")
    key(page, "e")
    points = page.all(".handle.point")
    assert len(points) == len(page.all(".handle.between")) == sum(len(ring) // 2 for ring in before)

    def grab(selector, index, by=None, double=False):
        node = page.browser.execute_script(
            "return [...document.querySelectorAll(arguments[0])].find((each) => each.dataset.index == arguments[1] && "
            "each.dataset.ring == 0)", selector, index,
        )  # fmt: skip
        actions = ActionChains(page.browser)
        if double:
            actions.double_click(node)
        elif by:
            actions.move_to_element(node).click_and_hold().move_by_offset(*by).release()
        else:
            actions.context_click(node)
        actions.perform()
        idle(page)

    index = top_handle(page, ".handle.point")
    grab(".handle.point", index, by=(40, 20))
    moved = shown(page)
    scale = page.one("#stage svg").rect["width"] / 60
    change = np.array(moved[0]) - np.array(before[0])
    assert change[2 * index : 2 * index + 2] == pytest.approx(np.array([40, 20]) / scale, abs=1.5 / scale)
    assert np.count_nonzero(change) == 2
    assert page.texts("#candidates button")[0] == "1 edited"

    index = top_handle(page, ".handle.between")
    grab(".handle.between", index, by=(-30, 30))
    inserted = shown(page)
    assert inserted[0][: 2 * index + 2] + inserted[0][2 * index + 4 :] == moved[0]

    index = top_handle(page, ".handle.point")
    for double in (True, False):
        was = shown(page)
        index = top_handle(page, ".handle.point")
        grab(".handle.point", index, double=double)
        assert shown(page)[0] == was[0][: 2 * index] + was[0][2 * index + 2 :]
    key(page, "zz")
    assert shown(page) == inserted
    assert len(page.all(".click")) == 1  # editing is no clicking
    entry = downloaded(page, downloads, "#save-json", "noise.json")["prompted"][0]
    assert entry["segmentation"] == inserted
    xs, ys = (np.concatenate([ring[axis::2] for ring in inserted]) for axis in (0, 1))
    assert entry["bbox"] == pytest.approx([min(xs), min(ys), np.ptp(xs), np.ptp(ys)], abs=0.01)
    key(page, "e")
    second = press(page, 12, 30)
    expected = plain(predictor.click(PIXELS, [first, second], previous=as_previous(inserted)))
    assert shown(page) == expected[0]["segmentation"]


def top_handle(page, selector):
    """The index of a handle of the first polygon that no other one covers."""
    return page.browser.execute_script(
        "return Number([...document.querySelectorAll(arguments[0])].find((node) => { const { x, y, width, height } = "
        "node.getBoundingClientRect(); return node.dataset.ring == 0 && "
        "document.elementFromPoint(x + width / 2, y + height / 2) === node }).dataset.index)",
        selector,
    )


def test_objects_are_kept_found_taken_up_again_and_exported(page, predictor, downloads):
    one = plain(predictor.click(PIXELS, [press(page, 30, 20)]))[0]
    key(page, Keys.ENTER)
    assert not page.all(".click, [data-layer=clicks] .chosen")
    other = plain(predictor.click(PIXELS, [press(page, 50, 33)]))[0]
    content = downloaded(page, downloads, "#save-json", "noise.json")
    assert content == {"image": "noise.jpg", "width": 60, "height": 40, "prompted": [one, other]}
    downloaded(page, downloads, "#save-coco", "noise.coco.json")
    coco = COCO(downloads / "noise.coco.json")
    assert [each["bbox"] for each in coco.anns.values()] == [one["bbox"], other["bbox"]]
    for entry, mask in zip(coco.anns.values(), (one, other), strict=True):
        rings = [np.array(ring).reshape(-1, 2) for ring in mask["segmentation"]]
        np.testing.assert_array_equal(coco.annToMask(entry).astype(bool), rasterize(rings, 40, 60))
        assert entry["area"] == pytest.approx(sum(map(shoelace, rings)), abs=0.1)
    page.all("#kept button")[0].click()
    idle(page)
    assert shown(page) == one["segmentation"]
    assert len(page.all("#kept button")) == 1  # the one that was being clicked
    page.one("#everything").click()
    idle(page)
    found = plain(predictor.everything(PIXELS))
    assert found
    assert downloaded(page, downloads, "#save-json", "noise.json")["prompted"] == found


def shoelace(ring):
    x, y = ring.T
    return abs(np.dot(x, np.roll(y, -1)) - np.dot(y, np.roll(x, -1))) / 2


def test_an_image_that_the_server_dropped_is_sent_again(page, predictor):
    press(page, 30, 20)
    page.all("#examples button")[1].click()
    page.until(lambda: not page.all(".click"))
    ActionChains(page.browser).move_to_element(page.one("#stage svg")).click().perform()  # the server keeps one image
    page.until(lambda: page.all("#candidates button"))
    page.all("#examples button")[0].click()
    page.until(lambda: not page.all(".click"))
    first = press(page, 30, 20)
    requests(page)
    page.browser.execute_async_script(SEND_OTHER)
    second = press(page, 12, 30)
    previous = as_previous(plain(predictor.click(PIXELS, [first]))[0]["segmentation"])
    assert shown(page) == plain(predictor.click(PIXELS, [first, second], previous=previous))[0]["segmentation"]
    sent = [url.rsplit("/", 1)[1] for url in requests(page)]
    assert sent == ["1.jpg", "images", "clicks", "images", "clicks"]


def test_an_error_is_a_line_and_changes_nothing(page):
    for x in (8, 16, 24, 32, 40, 48):
        press(page, x, 20)
    before = shown(page)
    stage = page.one("#stage svg")
    ActionChains(page.browser).move_to_element_with_offset(stage, 0, 40).click().perform()
    page.until(lambda: page.one("#status").get_attribute("class") == "error")
    assert page.text("#status") == "Error: 7 clicks were given, but the model reads at most 6"
    assert len(page.all(".click")) == 6
    assert shown(page) == before


def test_a_model_of_clicks_alone_has_no_switch_and_no_tokens(page):
    assert page.one("body").get_attribute("data-mode") == "clicks"
    hidden = ["#mode", "#tasks", "#sequences", "#threshold"]
    assert [page.browser.find_element(By.CSS_SELECTOR, each).is_displayed() for each in hidden] == [False] * 4
    assert page.one("#clicks").is_displayed()
    faults = [each for each in page.browser.get_log("browser") if "/clicks" not in each["message"]]
    assert faults == []

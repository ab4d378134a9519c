"""Finding and searching on the web page in headless Chromium: draw a box, enter words, search a folder, open a hit."""

import re

import pytest
from browser import needs_browser, open_page, requests
from colours import find, seeing_colours
from random_model import OLD, random_model
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.keys import Keys
from test_serve_search import BLUE, RED, scene
from web_client import encoded, serving

from pix2seq import Predictor
from pix2seq.search import open_index, update_index
from pix2seq.web.examples import ExampleImage

pytestmark = [pytest.mark.slow, needs_browser]
SHOWN = scene((RED, 3, 4, 13, 24), (BLUE, 20, 2, 30, 9))
OTHER = scene((BLUE, 1, 1, 7, 9), (RED, 10, 10, 18, 19), size=(20, 20))


@pytest.fixture(scope="module", autouse=True)
def colours():
    with seeing_colours():
        yield


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    (folder / "more").mkdir()
    (folder / "red.png").write_bytes(encoded(scene((RED, 0, 0, 40, 30))))
    (folder / "more" / "half.png").write_bytes(encoded(scene((RED, 0, 0, 20, 30))))
    (folder / "blue.png").write_bytes(encoded(scene((BLUE, 0, 0, 40, 30))))
    return folder


@pytest.fixture(scope="module")
def opened(photos, tmp_path_factory):
    predictor = Predictor(random_model())
    index = open_index(tmp_path_factory.mktemp("index"), photos, checkpoint=OLD, model="m")
    update_index(predictor, index)
    examples = [ExampleImage("shown", encoded(SHOWN)), ExampleImage("other", encoded(OTHER))]
    downloads = tmp_path_factory.mktemp("downloads")
    with serving(predictor, examples=examples, index=index) as port, open_page(port, downloads) as page:
        page.until(lambda: page.browser.execute_script("return document.body.dataset.ready !== undefined"))
        page.until(lambda: "answered in" in page.text("#status"))
        yield page


@pytest.fixture
def page(opened):
    """The page with its first example shown, in the mode of finding, which has that image as its example."""
    opened.one("#mode [value=find]").click()
    show(opened, 0)
    opened.one("#take-shown").click()
    opened.until(lambda: not opened.all("#reference [data-layer=examples] *, #found li"))
    return opened


def show(page, number):
    name = ("shown", "other")[number]
    page.all("#examples button")[number].click()
    width = {"shown": 40, "other": 20}[name]
    page.until(lambda: (view(page, "#stage") or "").startswith(f"0 0 {width} "))


def view(page, stage):
    """The size of the image on a stage: 0 0 width height."""
    return page.browser.execute_script("return arguments[0].getAttribute('viewBox')", page.one(f"{stage} svg"))


def draw(page, box, width, *, shift=False):
    """Drag a box, in pixels of the example image of this width."""
    svg = page.one("#reference svg")
    page.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", svg)
    rect = svg.rect
    scale = rect["width"] / width
    at = [(round(x * scale - rect["width"] / 2), round(y * scale - rect["height"] / 2)) for x, y in (box[:2], box[2:])]
    actions = ActionChains(page.browser)
    if shift:
        actions.key_down(Keys.SHIFT)
    actions.move_to_element_with_offset(svg, *at[0]).click_and_hold().move_to_element_with_offset(svg, *at[1]).release()
    actions.perform()
    if shift:
        ActionChains(page.browser).key_up(Keys.SHIFT).perform()


def boxes(page):
    return [page.rectangle(box) for box in page.shown("#stage [data-layer=boxes] rect")]


def drawn(page):
    return [page.rectangle(box) for box in page.all("#reference [data-layer=examples] rect")]


def enter(page, words):
    field = page.one("#by-words input")
    field.clear()
    field.send_keys(words, Keys.ENTER)


def expected(pixels, **question):
    return [each.to_json()["bbox"] for each in find(None, pixels, **question)]


def test_a_box_in_the_example_finds_its_like_in_the_shown_image_and_in_the_next(page):
    draw(page, (21, 3, 29, 8), 40)
    page.until(lambda: boxes(page))
    assert drawn(page) == [pytest.approx([21, 3, 8, 5], abs=0.3)]
    assert boxes(page) == expected(SHOWN, like=[(SHOWN, (21, 3, 29, 8))]) == [[20, 2, 10, 7]]
    assert page.texts("#found li") == ["object 0.75"]
    assert page.shown("#stage [data-layer=labels] text")
    assert re.match(r"shown.jpg, 1 object found in \d+ ms", page.text("#status"))
    show(page, 1)
    page.until(lambda: boxes(page) == [[1, 1, 6, 8]])
    assert view(page, "#reference") == "0 0 40 30"  # the example stays
    assert len(drawn(page)) == 1
    page.one("#clear-boxes").click()
    page.until(lambda: not boxes(page))
    assert drawn(page) == []
    assert page.texts("#found li") == []


def test_another_image_is_the_example(page, tmp_path):
    (tmp_path / "mine.png").write_bytes(encoded(OTHER))
    page.one("#example-file").send_keys(str(tmp_path / "mine.png"))
    page.until(lambda: view(page, "#reference") == "0 0 20 20")
    draw(page, (11, 11, 17, 18), 20)
    page.until(lambda: boxes(page) == expected(SHOWN, like=[(OTHER, (11, 11, 17, 18))]))
    assert boxes(page) == [[3, 4, 10, 20]]
    draw(page, (2, 2, 6, 8), 20)  # another box takes its place
    page.until(lambda: boxes(page) == [[20, 2, 10, 7]])
    assert len(drawn(page)) == 1
    draw(page, (2, 15, 2, 15), 20)  # a click is no box
    assert len(drawn(page)) == 1


def test_shift_adds_an_example(page):
    page.browser.get_log("performance")
    draw(page, (21, 3, 29, 8), 40)
    page.until(lambda: boxes(page))
    draw(page, (4, 5, 12, 20), 40, shift=True)
    page.until(lambda: page.one("#status").get_attribute("class") == "error")  # the stand-in takes one
    assert len(drawn(page)) == 2
    assert requests(page)[-1].endswith("/find")


def test_words_find_what_they_name(page):
    draw(page, (21, 3, 29, 8), 40)
    page.until(lambda: boxes(page))
    enter(page, "the red one")
    page.until(lambda: boxes(page) == expected(SHOWN, words="the red one") == [[3, 4, 10, 20]])
    assert drawn(page) == []  # one question at a time
    show(page, 1)
    page.until(lambda: boxes(page) == [[10, 10, 8, 9]])
    enter(page, "the green one")
    page.until(lambda: "0 objects found" in page.text("#status"))
    assert boxes(page) == []
    enter(page, "")
    page.until(lambda: not boxes(page))


def test_tasks_and_finding_do_not_mix(page):
    enter(page, "the red one")
    page.until(lambda: boxes(page) == [[3, 4, 10, 20]])
    assert not page.one("#sequences").is_displayed()
    page.one("#mode [value=tasks]").click()
    page.until(lambda: "answered in" in page.text("#status") or page.all("#objects li"))
    assert page.one("#sequences").is_displayed()
    assert not page.one("#find").is_displayed()
    page.until(lambda: [3, 4, 10, 20] not in boxes(page))
    page.one("#mode [value=find]").click()
    page.until(lambda: boxes(page) == [[3, 4, 10, 20]])
    enter(page, "")


def test_a_search_shows_a_grid_and_a_click_opens_an_image(page, photos):
    assert page.one("#search input").get_attribute("placeholder") == f"Search 3 images of {photos.name}"
    assert not page.one("#results").is_displayed()
    page.one("#search input").send_keys("something red", Keys.ENTER)
    page.until(lambda: page.all("#results li"))
    assert page.texts("#results span")[:2] == ["red.png", "more/half.png"]
    assert [text.split(" ")[0] for text in page.texts("#results small")] == ["1.00", "0.50", "0.00"]
    script = (
        "return [...document.querySelectorAll('#results img')].map((each) => [each.naturalWidth, each.naturalHeight])"
    )
    page.until(lambda: page.browser.execute_script(script) == [[40, 30]] * 3)
    assert page.text("#search p").startswith("3 images, best first")
    page.all("#results button")[1].click()
    page.until(lambda: view(page, "#stage") == "0 0 40 30" and color(page, 5) == [255, 0, 0])
    assert color(page, 35) == [0, 0, 0]
    enter(page, "red")
    page.until(lambda: boxes(page) == [[0, 0, 20, 30]])
    assert page.text("#status").startswith("half.png, 1 object")
    page.one("#alike").click()
    page.until(lambda: page.texts("#results span")[0] == "more/half.png")
    assert float(page.texts("#results small")[0]) == pytest.approx(1, abs=1e-3)
    enter(page, "")


def color(page, x):
    """The colour of a pixel of the shown image."""
    script = """
        const canvas = new OffscreenCanvas(1, 1), context = canvas.getContext("2d");
        context.drawImage(document.querySelector("#stage img"), -arguments[0], -5);
        return [...context.getImageData(0, 0, 1, 1).data].slice(0, 3)"""
    return page.browser.execute_script(script, x)


def test_an_error_of_a_search_is_a_line(page):
    page.browser.execute_script("document.querySelector('#search input').maxLength = 2000")
    page.browser.execute_script("document.querySelector('#search input').value = 'x'.repeat(1500)")
    page.one("#search button").click()
    page.until(lambda: "error" in page.one("#search p").get_attribute("class"))
    assert "at most 1000 characters" in page.text("#search p")
    page.one("#search input").clear()


def test_the_page_asks_no_other_machine_and_reports_no_error(opened):
    assert [each for each in requests(opened) if not re.match(r"http://127\.0\.0\.1:\d+/", each)] == []
    logged = opened.browser.get_log("browser")
    assert [each for each in logged if not re.search("/find|/search", each["message"])] == []


def test_a_model_that_finds_nothing_has_no_such_mode_and_no_search(tmp_path):
    predictor = Predictor(random_model())
    predictor.can_find_like = predictor.can_find_words = False
    with serving(predictor) as port, open_page(port, tmp_path) as page:
        page.until(lambda: page.browser.execute_script("return document.body.dataset.ready !== undefined"))
        assert [page.one(each).is_displayed() for each in ("#search", "#find", "#mode")] == [False] * 3
        assert page.one("#tasks").is_displayed()

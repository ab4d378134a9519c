"""A page in headless Chromium, for tests that look at it as people do."""

import json
import shutil
import time
from contextlib import contextmanager

import pytest
from selenium import webdriver
from selenium.webdriver.common.action_chains import ActionChains
from selenium.webdriver.common.by import By

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
needs_browser = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="needs Chromium and chromedriver (Debian: chromium-driver)"
)


@contextmanager
def open_page(port, downloads):
    """Open the page of a server; every request that it makes is logged."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1440,1000"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    browser = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
    try:
        browser.get(f"http://127.0.0.1:{port}/")
        yield Page(browser)
    finally:
        browser.quit()


class Page:
    def __init__(self, browser):
        self.browser = browser

    def all(self, selector):
        return self.browser.find_elements(By.CSS_SELECTOR, selector)

    def shown(self, selector):
        return [each for each in self.all(selector) if each.is_displayed()]

    def one(self, selector):
        return self.browser.find_element(By.CSS_SELECTOR, selector)

    def text(self, selector):
        return self.one(selector).text

    def until(self, condition, seconds=30):
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, self.text("#status")
            time.sleep(0.05)

    def texts(self, selector):
        """The texts of all elements at one moment."""
        script = "return [...document.querySelectorAll(arguments[0])].map((each) => each.textContent)"
        return self.browser.execute_script(script, selector)

    def point(self, node):
        self.browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", node)
        ActionChains(self.browser).move_to_element(node).perform()

    def leave(self):
        self.point(self.one("h1"))

    def tab(self, name):
        next(each for each in self.all("#tabs button") if each.text.lower() == name).click()

    def slide(self, value):
        self.browser.execute_script(
            "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input', {bubbles: true}))",
            self.one("#threshold input"),
            value,
        )

    def rectangle(self, node):
        return [float(node.get_attribute(name)) for name in ("x", "y", "width", "height")]


def requests(page):
    """The addresses that the page asked for since this was last called."""
    messages = [json.loads(entry["message"])["message"] for entry in page.browser.get_log("performance")]
    sent = [each["params"]["request"]["url"] for each in messages if each["method"] == "Network.requestWillBeSent"]
    return [url for url in sent if not url.startswith(("blob:", "data:"))]

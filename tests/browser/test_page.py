"""The status page in headless Chromium: what people see, over the built-in model and over one that means harm."""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable
from typing import Any

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webdriver import WebDriver
from selenium.webdriver.support.ui import WebDriverWait

from jax_mla_cp.engine import CompileProgress
from tests.browser.conftest import HOSTILE, KEY, HostileModel


class Page:
    def __init__(self, browser: WebDriver, url: str) -> None:
        self.browser = browser
        browser.get_log("browser")  # forgets what the page before said
        browser.get(url)

    def text(self, name: str) -> str:
        return self.browser.find_element(By.ID, name).text

    def click(self, name: str) -> None:
        self.browser.find_element(By.ID, name).click()

    def count(self, selector: str) -> int:
        return len(self.browser.find_elements(By.CSS_SELECTOR, selector))

    def script(self, code: str) -> Any:
        return self.browser.execute_script(code)

    def until(self, condition: Callable[[], Any], seconds: float = 20) -> Any:
        return WebDriverWait(self.browser, seconds, poll_frequency=0.1).until(lambda _: condition())

    def use_key(self) -> None:
        self.script("document.querySelector('details').open = true")
        self.browser.find_element(By.ID, "api-key").send_keys(KEY)
        self.until(lambda: self.text("health-text").startswith("Healthy"))

    def ask(self, text: str, tokens: int = 16) -> None:
        self.script(f"document.getElementById('chat-max').value = {tokens}")
        self.browser.find_element(By.ID, "chat-input").send_keys(text + Keys.ENTER)

    def answered(self, seconds: float = 120) -> str:
        """The last answer, when it is whole."""
        self.until(lambda: not self.browser.find_element(By.ID, "chat-stop").is_displayed(), seconds)
        return self.browser.find_elements(By.CSS_SELECTOR, ".message")[-1].text

    def complaints(self) -> list[str]:
        """The console's messages: errors of the scripts, and what the policy has stopped."""
        return [entry["message"] for entry in self.browser.get_log("browser")]


@pytest.fixture
def page(browser: WebDriver, guarded_url: str) -> Page:
    """With the key."""
    page = Page(browser, guarded_url)
    page.use_key()
    page.complaints()  # that there was no key at first
    return page


def test_without_the_key_the_page_asks_for_it(browser: WebDriver, guarded_url: str) -> None:
    page = Page(browser, guarded_url)
    page.until(lambda: "API key" in page.text("health-text"))
    assert all("401" in complaint for complaint in page.complaints()), "its own files need no key"
    page.use_key()
    page.ask("Hello")
    assert page.answered() and page.count(".message.error") == 0
    for store in ("localStorage", "sessionStorage"):
        assert page.script(f"return {store}.length") == 0
    assert page.script("return document.cookie") == "" and KEY not in browser.current_url
    assert KEY not in page.script("return document.documentElement.outerHTML")
    browser.refresh()
    page.until(lambda: "API key" in page.text("health-text"))


def test_a_wrong_key_is_told_in_the_chat(browser: WebDriver, guarded_url: str) -> None:
    page = Page(browser, f"{guarded_url}/")
    page.use_key()
    browser.find_element(By.ID, "api-key").send_keys("x")
    page.ask("Hello")
    assert "API key" in page.answered() and page.count(".message.error") == 1


def test_it_shows_mesh_pages_and_model_without_a_complaint(page: Page) -> None:
    assert page.text("model") == "jax-mla-cp-tiny"
    assert page.count("#mesh rect") == 8 and page.text("mesh-size") == "dp 1 × cp 4 × tp 2 = 8 devices"
    pages = page.browser.find_element(By.ID, "pages").get_attribute("aria-label") or ""
    numbers = re.fullmatch(r"(\d+) of (\d+) pages in use, (\d+) reusable, (\d+) free", pages)
    assert numbers, pages
    used, total, cached, free = map(int, numbers.groups())
    assert used + cached + free == total == 192
    assert page.count("#rank-pairs li") == 4 and page.count(".chart svg") == 5
    assert "xla" in page.text("facts")
    time.sleep(2)
    assert page.complaints() == []


def test_the_built_in_model_answers(page: Page) -> None:
    page.ask("What is context parallelism?")
    assert page.answered() and page.count(".message.error") == 0
    assert re.search(r"\d+ prompt tokens · \d+ generated · first token after .* m?s", page.text("chat-log"))
    assert page.complaints() == []


def test_a_long_prompt_is_drawn_as_a_zigzag_while_it_is_prefilled(page: Page) -> None:
    page.click("chat-long")
    seen = set()

    def finished() -> bool:
        progress = page.script("return document.querySelector('.prompt-head span')?.textContent")
        seen.add((page.text("zigzag-state"), progress))
        return not page.browser.find_element(By.ID, "chat-stop").is_displayed()

    page.until(finished, 120)
    assert any(state == "prefilling" and progress and "100%" not in progress for state, progress in seen), seen
    assert page.count(".message.error") == 0
    page.until(lambda: "100%" in page.text("prompts"))
    boxes = page.script(
        "return [...document.querySelectorAll('#prompts rect.edge')].slice(0, 8).map(r => [+r.getAttribute('x'), +r.getAttribute('y')])"
    )
    lanes = sorted({y for _, y in boxes})
    assert [lanes.index(y) for _, y in boxes] == [0, 1, 2, 3, 3, 2, 1, 0]
    assert [x for x, _ in boxes] == sorted(x for x, _ in boxes)
    assert re.match(r"Balance (0\.9|1\.0)\d+", page.text("balance"))
    assert page.complaints() == []


CONTRAST = """
const light = (c) => { const [r, g, b] = c.match(/[\\d.]+/g).map((v) => v / 255).map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
const ground = (e) => { for (; e; e = e.parentElement) { const c = getComputedStyle(e).backgroundColor; if (c !== 'rgba(0, 0, 0, 0)') return c; } };
return [...document.querySelectorAll('body *')]
  .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
  .map((e) => { const s = getComputedStyle(e); const [a, b] = [light(e instanceof SVGElement ? s.fill : s.color), light(ground(e))].sort((x, y) => y - x); return [(a + 0.05) / (b + 0.05), e.outerHTML.slice(0, 80)]; })
  .filter(([ratio]) => ratio < 4.5);
"""


def test_it_is_readable_in_both_themes_and_on_a_phone(page: Page) -> None:
    driver: Any = page.browser
    try:
        for theme, width in itertools.product(("light", "dark"), (1280, 380)):
            scheme = {"name": "prefers-color-scheme", "value": theme}
            size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
            driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})
            driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            page.until(lambda theme=theme: page.script("return document.documentElement.dataset.theme") == theme)
            page.until(lambda width=width: page.script("return document.documentElement.scrollWidth") <= width)
            assert page.script(CONTRAST) == []
    finally:
        driver.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})
        driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})


def test_everything_has_a_name_and_the_keyboard_reaches_it(page: Page) -> None:
    unnamed = page.script(
        "return [...document.querySelectorAll('button, input, textarea, [role=img]')].filter((e) => !(e.textContent.trim() || "
        "e.getAttribute('aria-label') || e.labels?.length)).map((e) => e.id)"
    )
    assert unnamed == []
    reached = []
    page.script("document.activeElement.blur()")
    for _ in range(24):  # wherever it starts, once round
        page.browser.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.browser.switch_to.active_element.get_attribute("id"))
    order = [
        "theme",
        "chat-clear",
        "chat-log",
        "chat-input",
        "chat-send",
        "chat-long",
        "chat-max",
        "chat-temperature",
        "api-key",
    ]
    start = reached.index("theme")
    assert [name for name in reached[start:] if name in order][: len(order)] == order


def test_what_a_model_says_is_text(browser: WebDriver, hostile_url: str) -> None:
    page = Page(browser, hostile_url)
    page.until(lambda: page.text("model") == "<i>tiny</i>")
    assert page.script("return document.getElementById('chat-label').textContent") == "Text to continue"
    page.ask(HOSTILE, 2 * len(HOSTILE))
    answer = page.answered()
    assert HOSTILE.strip() in page.browser.find_element(By.CSS_SELECTOR, ".message.assistant").text, answer
    assert page.count("#chat-log img, #chat-log script, #chat-log b, #facts u, h1 i") == 0
    assert "owned" not in browser.title
    assert page.count("#mesh > div") == 2 and page.count("#mesh rect") == 12
    assert page.complaints() == []


def test_an_answer_can_be_stopped(browser: WebDriver, hostile_url: str) -> None:
    page = Page(browser, hostile_url)
    page.until(lambda: page.text("model") == "<i>tiny</i>")
    page.ask("x", 500)
    page.until(lambda: page.script("return document.querySelector('.message.assistant')?.textContent"))
    page.click("chat-stop")
    page.answered(5)
    assert 0 < len(page.browser.find_element(By.CSS_SELECTOR, ".message.assistant").text) < 450
    page.until(lambda: page.text("running") == "0")
    assert page.count(".message.error") == 0 and page.complaints() == []


def test_a_compilation_is_shown(browser: WebDriver, hostile_url: str, hostile_model: HostileModel) -> None:
    page = Page(browser, hostile_url)
    page.until(lambda: page.text("health-text").startswith("Healthy"))
    notice = browser.find_element(By.ID, "compiling")
    assert not notice.is_displayed()
    hostile_model.compiling = CompileProgress(1, 7, 512, time.monotonic())
    try:
        page.until(notice.is_displayed)
        assert notice.text.startswith("Compiling 2 of 7 programs (512 tokens per step).")
    finally:
        hostile_model.compiling = None
    page.until(lambda: not notice.is_displayed())
    assert page.complaints() == []


def test_the_page_says_when_the_server_is_gone(browser: WebDriver, hostile_url: str) -> None:
    page = Page(browser, hostile_url)
    page.until(lambda: page.text("health-text").startswith("Healthy"))
    driver: Any = browser
    offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
    try:
        driver.execute_cdp_cmd("Network.enable", {})
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline)
        page.until(lambda: page.text("health-text") == "Not answering")
        page.ask("Hello")
        assert "can't be reached" in page.answered()
    finally:
        driver.execute_cdp_cmd("Network.emulateNetworkConditions", offline | {"offline": False})
    page.until(lambda: page.text("health-text").startswith("Healthy"))

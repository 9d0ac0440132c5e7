"""A real Chromium that opens the pages, and what a person does there. Needs selenium, chromium and chromedriver."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from selenium.webdriver import ActionChains, Chrome, ChromeOptions
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import Select

from tests.support.browser import CHROMIUM
from tests.support.patience import eventually

T = TypeVar("T")

FLAGS = [
    *CHROMIUM,
    # No name is ever looked up: what a page would fetch from elsewhere fails, and is seen in the log of requests.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
]


@contextmanager
def chromium(binary: str, driver: str) -> Iterator[Chrome]:
    """A headless Chromium with a profile of its own, which logs what pages request and complain about."""
    options = ChromeOptions()
    options.binary_location = binary
    for flag in FLAGS:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL", "browser": "ALL"})
    started = Chrome(options=options, service=Service(driver))
    try:
        yield started
    finally:
        started.quit()


class Page:
    """One tab on the pages of `origin`. Whatever a test does must keep to that origin: `check` says so."""

    keys = Keys

    def __init__(self, driver: Chrome, origin: str, key: str) -> None:
        self.driver = driver
        self.origin = origin
        self.key = key
        self.window(1200, 1000)
        self.drain()

    def open(self, path: str) -> None:
        self.driver.get(self.origin + path)

    def window(self, width: int, height: int, scheme: str = "light") -> None:
        """Sets the size in CSS pixels and the colour scheme that the person prefers."""
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})

    def screenshot(self, path: Path) -> None:
        """The whole page, however long."""
        path.parent.mkdir(parents=True, exist_ok=True)
        assert self.driver.find_element(By.TAG_NAME, "html").screenshot(str(path))

    def run(self, script: str, *arguments: Any) -> Any:
        return self.driver.execute_script(script, *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        return self.find(selector).text

    @property
    def focused(self) -> WebElement:
        return self.driver.switch_to.active_element

    def press(self, *keys: str) -> None:
        """Presses keys one after the other, wherever the focus is."""
        ActionChains(self.driver).send_keys(*keys).perform()

    def press_with(self, modifier: str, key: str) -> None:
        """Presses a key while the modifier is held."""
        ActionChains(self.driver).key_down(modifier).send_keys(key).key_up(modifier).perform()

    def fill(self, **fields: str) -> None:
        """Types into the fields of these ids, in place of what is there."""
        for name, text in fields.items():
            field = self.find(f"#{name}")
            field.send_keys(Keys.CONTROL, "a", Keys.NULL, Keys.DELETE)
            field.send_keys(text)

    def choose(self, name: str, option: str) -> None:
        Select(self.find(f"#{name}")).select_by_visible_text(option)

    def complete(self, **fields: str) -> None:
        """Types the key and the fields, and asks for a completion."""
        self.fill(key=self.key, **fields)
        self.find("#complete").click()

    def tip_rows(self) -> dict[str, str]:
        """The alternatives that the card beside a token tells, and their probabilities."""
        rows = [row.find_elements(By.CSS_SELECTOR, "code, :last-child") for row in self.all("#tip li")]
        return {cells[0].text: cells[-1].text for cells in rows}

    def hover(self, element: WebElement) -> None:
        ActionChains(self.driver).move_to_element(element).perform()

    def wait(self, condition: Callable[[], T]) -> T:
        """The condition's first true result."""
        return eventually(condition, lambda: f"the page says {self.text('body')!r}")

    def wait_for_key(self) -> None:
        """Returns once the playground knows that the service needs a key."""
        self.wait(lambda: self.find("#key").is_displayed())

    def wait_for_status(self, start: str) -> None:
        self.wait(lambda: self.text("#status").startswith(start))

    @property
    def shown_text(self) -> str:
        """The completion as one reads it; of several choices, all in order."""
        return str(self.run("return [...document.querySelectorAll('.text')].map(e => e.textContent).join('')"))

    def drain(self) -> tuple[list[str], list[str]]:
        """The addresses requested and the errors logged since the last call."""
        messages = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
        errors = [entry["message"] for entry in self.driver.get_log("browser") if entry["level"] == "SEVERE"]
        return sent, errors

    def check(self) -> None:
        """Nothing was requested elsewhere, no policy or script failed, and the key is in no address and not on disk."""
        sent, errors = self.drain()
        assert [url for url in sent if not url.startswith((f"{self.origin}/", "data:", "about:"))] == []
        assert [url for url in [*sent, self.driver.current_url] if self.key in url] == []
        # The service's refusals are logged as failed loads; tests look at those on the page.
        assert [error for error in errors if "Failed to load resource" not in error] == []
        assert self.run("return [localStorage.length, document.cookie]") == [0, ""]

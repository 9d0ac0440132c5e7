"""The pages of a service that needs no key: nobody is asked for one."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.pages.expected import GREEDY, SCREENSHOTS, greedy
from tests.support.stack import Stack

if TYPE_CHECKING:
    from tests.pages.chromium import Page

pytestmark = pytest.mark.browser


@pytest.fixture
def open_page(tab: Page, stack: Stack) -> Iterator[Page]:
    """A tab on the pages of a stack without a key file."""
    guarded, tab.origin = tab.origin, f"http://{stack.envoy_address}"
    tab.window(1200, 1000)
    tab.open("/")
    tab.run("sessionStorage.clear()")
    tab.drain()
    yield tab
    tab.check()
    tab.origin = guarded


def test_the_first_press_completes(open_page: Page, stack: Stack) -> None:
    """At `/` there is the playground; its models are listed and its first press answered without a key."""
    open_page.open("/")
    assert open_page.text("h1") == "Playground"
    open_page.wait(lambda: open_page.text("#model-hint").endswith("are served."))
    assert not open_page.find("#key").is_displayed()
    open_page.fill(**GREEDY)
    open_page.find("#complete").click()
    open_page.wait_for_status("Finished")
    assert open_page.shown_text == greedy(stack)["text"]
    assert not open_page.find("#key").is_displayed()
    assert not open_page.find("#error").is_displayed()
    open_page.screenshot(SCREENSHOTS / "playground-without-a-key.png")


MARKS = "[...document.querySelector('openapi-explorer').shadowRoot.querySelectorAll('.security-info-button')]"
ASKED = "performance.getEntriesByType('resource').some((each) => each.name.endsWith('/v1/models'))"


def description_asks(page: Page) -> bool:
    """Whether the description of completions, once it has asked whether a key is needed, shows that one is."""
    page.open("/docs#?route=post-/v1/completions")
    page.driver.refresh()
    page.wait(lambda: page.run(f"return {ASKED} && {MARKS}.length"))
    return shows_a_mark(page)


def shows_a_mark(page: Page) -> bool:
    return bool(page.run(f"return {MARKS}.some((mark) => mark.checkVisibility())"))


def test_the_description_asks_for_none(open_page: Page) -> None:
    """The page that describes the API asks for no key where there is no need."""
    assert not description_asks(open_page) or open_page.wait(lambda: not shows_a_mark(open_page))


def test_the_description_asks_where_it_has_to(page: Page) -> None:
    """Where one is needed it says so."""
    assert description_asks(page)


def test_the_key_is_asked_for_once_it_is_wanted(page: Page) -> None:
    """Where a key is needed the field appears, without an error before anybody has asked for anything."""
    assert page.find("#key").is_displayed()
    assert not page.find("#error").is_displayed()
    assert page.text("#model-hint") == "The models are listed once there is a key."
    page.find("#complete").click()
    page.wait_for_status("Failed.")
    assert page.focused.get_attribute("id") == "key"
    page.complete(**GREEDY)
    page.wait_for_status("Finished")

"""The pages for everyone: by keyboard, in both colour schemes, on a narrow screen; and that nothing leaves them."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

import pytest
import yaml

from tests.pages.expected import GREEDY, SCREENSHOTS, Guarded, expected_rows, greedy
from tests.support.stack import KEY, ROOT

if TYPE_CHECKING:
    from tests.pages.chromium import Page

pytestmark = pytest.mark.browser
ORDER = ["prompt", "complete", "key", "model", "max_tokens", "temperature", "top_p", "seed", "n", "logprobs"]
ORDER += ["presence_penalty", "frequency_penalty", "stop_texts", "stream", "echo", "parse_special"]
PAIRS = [("ink", "paper"), ("ink", "card"), ("ink", "surprising"), ("soft", "card"), ("soft", "paper")]
PAIRS += [
    ("accent", "card"),
    ("accent", "paper"),
    ("on-accent", "accent"),
    ("wrong", "wrong-card"),
    ("soft", "wrong-card"),
]


def test_the_keyboard_alone_is_enough(page: Page, guarded: Guarded) -> None:
    """Tab reaches everything in order, each with a name and a visible focus; a text is asked for, read and copied."""
    visited = []
    page.press(page.keys.TAB)
    while page.focused.tag_name != "body" and len(visited) < 40:
        focused = page.focused
        assert focused.accessible_name
        assert focused.value_of_css_property("outline-style") != "none"
        visited.append(focused.get_attribute("id") or focused.get_attribute("data-copy") or focused.text)
        page.press(page.keys.TAB)
    assert visited[: len(ORDER) + 5] == ["API", *ORDER, "curl", "python", "buf", "grpc"]

    page.open("/playground")
    page.wait_for_key()
    page.press(*[page.keys.TAB] * 4, KEY, page.keys.TAB, page.keys.TAB)
    page.press_with(page.keys.CONTROL, "a")
    page.press("24", page.keys.TAB, "0")
    for _ in range(5):
        page.press_with(page.keys.SHIFT, page.keys.TAB)
    assert page.focused.get_attribute("id") == "prompt"
    page.press_with(page.keys.CONTROL, "a")
    page.press(GREEDY["prompt"])
    page.press_with(page.keys.CONTROL, page.keys.ENTER)
    page.wait_for_status("Finished")
    expected = greedy(guarded.stack, logprobs=5)
    assert page.shown_text == expected["text"]

    page.press(page.keys.TAB, page.keys.TAB)
    for index in (0, 1, 2):
        assert page.focused == page.all(".token")[index]
        assert page.find("#tip").is_displayed()
        assert page.tip_rows() == expected_rows(expected["logprobs"]["top_logprobs"][index])
        page.press(page.keys.ARROW_RIGHT)
    page.press(page.keys.ARROW_LEFT)
    page.press(page.keys.ESCAPE)
    assert not page.find("#tip").is_displayed()
    page.press(page.keys.END)
    assert page.focused == page.all(".token")[-1]
    page.press(page.keys.TAB)
    assert page.focused.get_attribute("id") == "key"


def test_the_key_stays_in_the_tab(page: Page) -> None:
    """The key survives a reload of its tab; a new tab, local storage, cookies and addresses know nothing of it."""
    page.complete(**GREEDY)
    page.wait_for_status("Finished")
    page.open("/playground")
    assert page.find("#key").get_property("value") == KEY
    assert page.run("return Object.keys(localStorage).length + document.cookie.length") == 0
    assert KEY not in page.driver.current_url
    first = page.driver.current_window_handle
    page.driver.switch_to.new_window("tab")
    try:
        page.open("/playground")
        assert page.find("#key").get_property("value") == ""
    finally:
        page.driver.close()
        page.driver.switch_to.window(first)


def test_the_page_can_reach_no_other_origin(page: Page) -> None:
    """Even a script on the page could send nothing elsewhere: the policy stops fetches, images and styles."""
    blocked = page.driver.execute_async_script(
        """
        const done = arguments[0], seen = [];
        document.addEventListener("securitypolicyviolation", (event) => seen.push(event.effectiveDirective));
        fetch("http://127.0.0.1:9/").catch(() => {});
        new Image().src = "http://127.0.0.1:9/i.png";
        document.head.append(Object.assign(document.createElement("style"), { textContent: "p { color: red }" }));
        setTimeout(() => done(seen), 300);
        """
    )
    assert sorted(blocked) == ["connect-src", "img-src", "style-src-elem"]
    _, errors = page.drain()
    assert any("Content Security Policy" in error for error in errors)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(page: Page, scheme: str) -> None:
    """Text has at least the contrast 4.5 to what is behind it, in both schemes, also on the most surprising token."""
    page.window(1200, 1000, scheme)
    colours = {}
    for name in set(itertools.chain(*PAIRS)):
        script = "document.body.style.color = `var(--${arguments[0]})`; return getComputedStyle(document.body).color"
        colours[name] = [int(part) for part in page.run(script, name).removeprefix("rgb(").rstrip(")").split(",")]
    assert len({tuple(colour) for colour in colours.values()}) > 5
    page.run("document.body.style.color = ''")
    for text, behind in PAIRS:
        light, dark = sorted((luminance(colours[text]), luminance(colours[behind])), reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5, f"{text} on {behind}"
    page.complete(**GREEDY)
    page.wait_for_status("Finished")
    page.screenshot(SCREENSHOTS / f"playground-{scheme}.png")


def luminance(colour: list[int]) -> float:
    """Relative luminance of an sRGB colour, as WCAG defines it."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in (c / 255 for c in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def test_a_narrow_screen_is_enough(page: Page) -> None:
    """At a width of 360 nothing is cut off or scrolls sideways, not even the card of the last token in a line."""
    page.window(360, 740)
    page.complete(**GREEDY)
    page.wait_for_status("Finished")
    page.find("[data-copy=curl]").click()
    for token in page.all(".token"):
        page.hover(token)
        box = page.find("#tip").rect
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= 360
    assert page.run("return document.documentElement.scrollWidth <= innerWidth")
    page.screenshot(SCREENSHOTS / "playground-narrow.png")


def test_the_api_is_described(page: Page) -> None:
    """The viewer renders the whole document: each operation, its fields, answers and errors."""
    page.open("/docs")
    # The viewer is made of custom elements within each other.
    shown = """
        const children = (node) => [...(node.shadowRoot ?? node).childNodes];
        const text = (node) => node.nodeType === Node.TEXT_NODE ? node.data : children(node).map(text).join("");
        return text(document.querySelector("openapi-explorer"));
    """
    for path in ("/v1/completions", "/v1/models", "/v1/models/{model}"):
        page.wait(lambda path=path: path in page.run(shown))
    page.screenshot(SCREENSHOTS / "docs.png")
    page.open("/docs#?route=post-/v1/completions")
    page.driver.refresh()
    page.wait(lambda: "Completes one or many prompts." in page.run(shown))
    described = page.run(shown)
    fields = yaml.safe_load((ROOT / "docs" / "openapi.yaml").read_text())["components"]["schemas"]
    for field in fields["CreateCompletionRequest"]["properties"]:
        assert field in described
    for status in ("200", "400", "401", "429", "503"):
        assert status in described
    page.screenshot(SCREENSHOTS / "docs-completions.png")

"""The playground and the viewer of the API in a real Chromium, as a person uses them."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from service.engine.engine import Engine, Stats
from service.settings import Settings
from tests.stack import KEY, ROOT, ServiceThread, Stack, envoy, free_ports

CHROMIUM, CHROMEDRIVER = shutil.which("chromium"), shutil.which("chromedriver")
pytest.importorskip("selenium", reason="selenium is not installed: `make test-browser` does that")

from selenium.webdriver.common.keys import Keys  # noqa: E402 - only where selenium is

from tests.browser import Page, chromium  # noqa: E402

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no chromium or chromedriver: `make test-browser`"),
]

SCREENSHOTS = ROOT / "build" / "screenshots"
ODD_PROMPT = 'It\'s "so" \\ 😀 $HOME `date`\n'


@dataclass(frozen=True)
class Guarded:
    """A stack that knows exactly one key, and its engine to look into."""

    stack: Stack
    engine: Engine


@pytest.fixture(scope="module")
def guarded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Guarded]:
    """A real server with a file of keys, behind a real Envoy."""
    folder = tmp_path_factory.mktemp("guarded")
    keys = folder / "keys"
    keys.write_text(f"{hashlib.sha256(KEY.encode()).hexdigest()} tester\n")
    http_port, grpc_port = free_ports(2)
    settings = Settings(model_dir=model_dir, port=grpc_port, max_running=4, drain_seconds=1, api_keys_file=keys)
    with ServiceThread(settings) as service, envoy(http_port, grpc_port, folder):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield Guarded(stack, service.server.model.engine)


@pytest.fixture(scope="module")
def tab(guarded: Guarded) -> Iterator[Page]:
    """One Chromium for all tests of this file."""
    assert CHROMIUM and CHROMEDRIVER  # noqa: PT018 - for the type checker: the mark has skipped otherwise
    with chromium(CHROMIUM, CHROMEDRIVER) as driver:
        yield Page(driver, f"http://{guarded.stack.envoy_address}", KEY)


@pytest.fixture
def page(tab: Page) -> Iterator[Page]:
    """The playground as at a first visit; afterwards it is checked that the key and all requests stayed here."""
    tab.window(1200, 1000)
    tab.open("/playground")
    tab.run("sessionStorage.clear()")
    tab.open("/playground")
    yield tab
    tab.check()


def complete(page: Page, **fields: str) -> None:
    """Types the key and the fields, and asks for a completion."""
    page.fill(key=KEY, **fields)
    page.find("#complete").click()


def asked(stack: Stack, **fields: Any) -> dict[str, Any]:
    """What the service answers to the same request; the only choice."""
    choice: dict[str, Any] = stack.complete(**fields).json["choices"][0]
    return choice


GREEDY = {"prompt": "The capital of France is", "max_tokens": "24", "temperature": "0"}


def greedy(stack: Stack, **fields: Any) -> dict[str, Any]:
    return asked(stack, prompt=GREEDY["prompt"], max_tokens=24, temperature=0, **fields)


def test_a_text_streams_in(page: Page, guarded: Guarded) -> None:
    """The text grows piece by piece to exactly what the service answers, with its tokens, usage and times."""
    page.run(
        "window.lengths = []; new MutationObserver(() => lengths.push(document.querySelectorAll('.token').length))"
        ".observe(document.getElementById('answer'), {childList: true, subtree: true})"
    )
    complete(page, **GREEDY)
    page.wait_for_status("Finished: length.")
    expected = greedy(guarded.stack, logprobs=5)
    assert page.shown_text == expected["text"]
    assert [token.get_property("textContent") for token in page.all(".token")] == expected["logprobs"]["tokens"]
    grown = page.run("return lengths")
    assert grown == sorted(grown)
    assert len(set(grown) - {0}) > 5
    figures = page.text("#figures")
    assert "24 tokens" in figures
    assert "ms" in figures
    assert "tokens/s" in figures
    assert page.text("#model-hint").endswith("are served.")
    page.screenshot(SCREENSHOTS / "playground.png")


def tip_rows(page: Page) -> dict[str, str]:
    """The alternatives that the card beside a token tells, and their probabilities."""
    rows = [row.find_elements("css selector", "code, :last-child") for row in page.all("#tip li")]
    return {cells[0].text: cells[-1].text for cells in rows}


def expected_rows(alternatives: dict[str, float]) -> dict[str, str]:
    def percent(logprob: float) -> str:
        return f"{100 * math.exp(logprob):.{1 if logprob > -4.6 else 3}f} %"

    shown = {token.replace("\n", "↵"): score for token, score in alternatives.items()}
    return {f"␣{token[1:]}" if token[0] == " " else token: percent(score) for token, score in shown.items()}


def test_tokens_are_shaded_and_tell_their_alternatives(page: Page, guarded: Guarded) -> None:
    """The less likely a token the stronger its shade; pointing at it tells the alternatives as scored."""
    complete(page, **GREEDY)
    page.wait_for_status("Finished")
    scores = greedy(guarded.stack, logprobs=5)["logprobs"]
    tokens = page.all(".token")
    for token, logprob in zip(tokens, scores["token_logprobs"], strict=True):
        assert surprise(page, token) == pytest.approx(100 * (1 - math.exp(logprob)), abs=0.06)
    shades = {token.value_of_css_property("background-color") for token in tokens}
    assert len(shades) > 5

    assert not page.find("#tip").is_displayed()
    page.hover(tokens[3])
    assert page.find("#tip").is_displayed()
    assert tip_rows(page) == expected_rows(scores["top_logprobs"][3])
    assert tokens[3].get_attribute("aria-describedby") == "tip"
    page.screenshot(SCREENSHOTS / "alternatives.png")
    page.hover(page.find("h1"))
    page.wait(lambda: not page.find("#tip").is_displayed())


def surprise(page: Page, token: Any) -> float:
    return float(page.run("return arguments[0].style.getPropertyValue('--surprise')", token).rstrip("%"))


@pytest.mark.parametrize("kind", ["curl", "python", "buf", "grpc"])
def test_copied_code_gives_the_same_text(page: Page, guarded: Guarded, kind: str) -> None:
    """What is copied runs as it is, holds no key, and prints the text that the page shows."""
    permissions = {"permissions": ["clipboardReadWrite", "clipboardSanitizedWrite"], "origin": page.origin}
    page.driver.execute_cdp_cmd("Browser.grantPermissions", permissions)
    page.fill(key=KEY, max_tokens="12", seed="9007199254740993", top_p="0.9", stop_texts="@@@")
    page.run("document.getElementById('prompt').value = arguments[0]", ODD_PROMPT)
    page.find("#complete").click()
    page.wait_for_status("Finished")
    page.find(f"[data-copy={kind}]").click()
    page.wait(lambda: page.text("#copied").startswith("Copied."))
    code = page.driver.execute_async_script("navigator.clipboard.readText().then(arguments[0])")
    assert code == page.find("#snippet").get_property("textContent")
    assert KEY not in code
    assert printed(kind, code) == page.shown_text


def printed(kind: str, code: str) -> str:
    """The text that a copied program prints when it runs with the key in its environment."""
    tools = Path(sys.executable).parent
    environment = {**os.environ, "API_KEY": KEY, "PATH": f"{tools}:{os.environ['PATH']}", "PYTHONPATH": "proto"}
    command = [sys.executable, "-c", code] if kind in {"python", "grpc"} else ["bash", "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    if kind == "curl":
        *events, end = done.stdout.removesuffix("\n\n").split("\n\n")
        assert end == "data: [DONE]"
        pieces = [json.loads(event.removeprefix("data: ")) for event in events]
    elif kind == "buf":
        decoder, rest, pieces = json.JSONDecoder(), done.stdout.strip(), []
        while rest:
            piece, end_at = decoder.raw_decode(rest)
            pieces.append(piece)
            rest = rest[end_at:].lstrip()
    else:
        return done.stdout.removesuffix("\n")
    return "".join(choice.get("text", "") for piece in pieces for choice in piece.get("choices", []))


@pytest.mark.parametrize("how", ["button", "key"])
def test_a_stream_can_be_stopped(page: Page, guarded: Guarded, how: str) -> None:
    """Stop, or Escape, ends the stream at once: what came stays, and the service stops generating."""
    complete(page, prompt="Once upon a time", max_tokens="3000", temperature="1", seed="5")
    page.wait(lambda: len(page.all(".token")) > 3)
    if how == "button":
        page.find("#stop").click()
    else:
        page.press(Keys.ESCAPE)
    page.wait_for_status("Stopped.")
    page.wait(lambda: guarded.engine.stats == Stats(running=0, waiting=0), seconds=2)
    count = len(page.all(".token"))
    time.sleep(0.3)
    assert 3 < len(page.all(".token")) == count < 2900
    assert "tokens/s" in page.text("#figures")
    assert page.find("#complete").is_enabled()
    assert not page.find("#stop").is_enabled()


def test_a_wrong_key_is_refused_in_the_services_words(page: Page, guarded: Guarded) -> None:
    """The page shows the very message of the service, points at the key, and works once the key is right."""
    page.fill(key="wrong-key", **GREEDY)
    page.find("#complete").click()
    page.wait(lambda: page.find("#error").is_displayed())
    body = json.dumps({"model": "gpt-3.5-turbo-instruct", "prompt": "a"})
    headers = {"authorization": "Bearer wrong-key", "content-type": "application/json"}
    refusal = guarded.stack.request("POST", "/v1/completions", body, headers)
    assert refusal.status == 401
    assert page.text("#error").startswith(refusal.json["error"]["message"])
    assert "HTTP 401 · invalid_request_error · invalid_api_key" in page.text("#error")
    assert page.find("#key").get_attribute("aria-invalid") == "true"
    page.wait(lambda: page.text("#status") == "Failed.")
    page.screenshot(SCREENSHOTS / "wrong-key.png")
    complete(page)
    page.wait_for_status("Finished")
    assert not page.find("#error").is_displayed()


def test_a_service_out_of_reach_is_told(page: Page) -> None:
    """Without a connection the page says so, and completes again once there is one."""
    page.fill(key=KEY, **GREEDY)
    page.wait(lambda: page.text("#model-hint").endswith("are served."))
    page.driver.set_network_conditions(offline=True, latency=0, throughput=0)
    try:
        page.find("#complete").click()
        page.wait_for_status("Failed.")
        assert page.text("#error").startswith("The service cannot be reached.")
    finally:
        page.driver.delete_network_conditions()
    page.find("#complete").click()
    page.wait_for_status("Finished")


@pytest.mark.parametrize(
    ("field", "value", "sent"),
    [("temperature", "3", 3), ("max_tokens", "-1", -1), ("n", "many", "many"), ("top_p", "1,5", "1,5")],
)
def test_a_bad_value_is_refused_in_the_services_words(
    page: Page, guarded: Guarded, field: str, value: str, sent: Any
) -> None:
    """Whatever is typed goes to the service; its message is shown, and its field is marked and focused."""
    complete(page, **{**GREEDY, field: value})
    page.wait_for_status("Failed.")
    request = {"prompt": GREEDY["prompt"], "max_tokens": 24, "temperature": 0, field: sent}
    error = guarded.stack.complete(**request).json["error"]
    assert page.text("#error").startswith(error["message"])
    if error["param"] == field:
        assert page.find(f"#{field}").get_attribute("aria-invalid") == "true"
        assert page.focused == page.find(f"#{field}")
    else:
        assert isinstance(sent, str)


def test_whole_answers_of_several_choices(page: Page, guarded: Guarded) -> None:
    """Without stream the answer comes whole: every choice under its title, with the echoed prompt, emoji and all."""
    page.find("#stream").click()
    page.find("#echo").click()
    page.fill(key=KEY, n="2", max_tokens="6", seed="3")
    page.run("document.getElementById('prompt').value = 'Hi 😀!'")
    page.find("#complete").click()
    page.wait_for_status("Finished")
    fields = {"prompt": "Hi 😀!", "n": 2, "max_tokens": 6, "seed": 3, "echo": True}
    expected = [choice["text"] for choice in guarded.stack.complete(**fields).json["choices"]]
    shown = page.run("return [...document.querySelectorAll('.text')].map(e => e.textContent.replaceAll('·', ''))")
    assert shown == expected
    assert [title.text for title in page.all("#answer h3")] == ["Choice 1", "Choice 2"]


def test_plain_text_without_scores(page: Page, guarded: Guarded) -> None:
    """With log probabilities off the text is plain: nothing to shade, and no legend."""
    page.choose("logprobs", "off")
    complete(page, **GREEDY)
    page.wait_for_status("Finished")
    assert page.shown_text == greedy(guarded.stack)["text"]
    assert page.all(".token") == []
    assert not page.find("#legend").is_displayed()


ORDER = ["prompt", "complete", "key", "model", "max_tokens", "temperature", "top_p", "seed", "n", "logprobs"]
ORDER += ["presence_penalty", "frequency_penalty", "stop_texts", "stream", "echo"]


def test_the_keyboard_alone_is_enough(page: Page, guarded: Guarded) -> None:
    """Tab reaches everything in order, each with a name and a visible focus; a text is asked for, read and copied."""
    visited = []
    page.press(Keys.TAB)
    while page.focused.tag_name != "body" and len(visited) < 40:
        focused = page.focused
        assert focused.accessible_name
        assert focused.value_of_css_property("outline-style") != "none"
        visited.append(focused.get_attribute("id") or focused.get_attribute("data-copy") or focused.text)
        page.press(Keys.TAB)
    assert visited[: len(ORDER) + 5] == ["API", *ORDER, "curl", "python", "buf", "grpc"]

    page.open("/playground")
    page.press(*[Keys.TAB] * 4, KEY, Keys.TAB, Keys.TAB)
    page.press_with(Keys.CONTROL, "a")
    page.press("24", Keys.TAB, "0")
    for _ in range(5):
        page.press_with(Keys.SHIFT, Keys.TAB)
    assert page.focused.get_attribute("id") == "prompt"
    page.press_with(Keys.CONTROL, "a")
    page.press(GREEDY["prompt"])
    page.press_with(Keys.CONTROL, Keys.ENTER)
    page.wait_for_status("Finished")
    expected = greedy(guarded.stack, logprobs=5)
    assert page.shown_text == expected["text"]

    page.press(Keys.TAB, Keys.TAB)
    for index in (0, 1, 2):
        assert page.focused == page.all(".token")[index]
        assert page.find("#tip").is_displayed()
        assert tip_rows(page) == expected_rows(expected["logprobs"]["top_logprobs"][index])
        page.press(Keys.ARROW_RIGHT)
    page.press(Keys.ARROW_LEFT)
    page.press(Keys.ESCAPE)
    assert not page.find("#tip").is_displayed()
    page.press(Keys.END)
    assert page.focused == page.all(".token")[-1]
    page.press(Keys.TAB)
    assert page.focused.get_attribute("id") == "key"


def test_the_key_stays_in_the_tab(page: Page) -> None:
    """The key survives a reload of its tab; a new tab, local storage, cookies and addresses know nothing of it."""
    complete(page, **GREEDY)
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


PAIRS = [("ink", "paper"), ("ink", "card"), ("ink", "surprising"), ("soft", "card"), ("soft", "paper")]
PAIRS += [
    ("accent", "card"),
    ("accent", "paper"),
    ("on-accent", "accent"),
    ("wrong", "wrong-card"),
    ("soft", "wrong-card"),
]


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
    complete(page, **GREEDY)
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
    complete(page, **GREEDY)
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

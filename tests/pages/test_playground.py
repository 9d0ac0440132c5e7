"""The playground in a real Chromium: texts, scores, stopping, and the request as code."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from service.engine.engine import Stats
from tests.pages.expected import GREEDY, SCREENSHOTS, Guarded, expected_rows, greedy
from tests.support.stack import KEY, ROOT

if TYPE_CHECKING:
    from tests.pages.chromium import Page

pytestmark = pytest.mark.browser
ODD_PROMPT = 'It\'s "so" \\ 😀 $HOME `date`\n'


def test_a_text_streams_in(page: Page, guarded: Guarded) -> None:
    """The text grows piece by piece to exactly what the service answers, with its tokens, usage and times."""
    page.run(
        "window.lengths = []; new MutationObserver(() => lengths.push(document.querySelectorAll('.token').length))"
        ".observe(document.getElementById('answer'), {childList: true, subtree: true})"
    )
    page.complete(**GREEDY)
    page.wait_for_status("Finished: length.")
    expected = greedy(guarded.stack, logprobs=5)
    assert page.shown_text == expected["text"]
    assert [token.get_property("textContent") for token in page.all(".token")] == expected["logprobs"]["tokens"]
    assert page.find("#answer").get_attribute("aria-busy") == "false"
    grown = page.run("return lengths")
    assert grown == sorted(grown)
    assert len(set(grown) - {0}) > 5
    figures = page.text("#figures")
    assert "24 tokens" in figures
    assert "ms" in figures
    assert "tokens/s" in figures
    assert page.text("#model-hint").endswith("are served.")
    page.screenshot(SCREENSHOTS / "playground.png")


def surprise(page: Page, token: Any) -> float:
    return float(page.run("return arguments[0].style.getPropertyValue('--surprise')", token).rstrip("%"))


def test_tokens_are_shaded_and_tell_their_alternatives(page: Page, guarded: Guarded) -> None:
    """The less likely a token the stronger its shade; pointing at it tells the alternatives as scored."""
    page.complete(**GREEDY)
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
    assert page.tip_rows() == expected_rows(scores["top_logprobs"][3])
    assert tokens[3].get_attribute("aria-describedby") == "tip"
    page.screenshot(SCREENSHOTS / "alternatives.png")
    page.hover(page.find("h1"))
    page.wait(lambda: not page.find("#tip").is_displayed())


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
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
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
    page.complete(prompt="Once upon a time", max_tokens="3000", temperature="1", seed="5")
    page.wait(lambda: len(page.all(".token")) > 3)
    if how == "button":
        page.find("#stop").click()
    else:
        page.press(page.keys.ESCAPE)
    page.wait_for_status("Stopped.")
    steps = guarded.engine.steps.turns
    page.wait(lambda: guarded.engine.stats == Stats(running=0, waiting=0))
    assert guarded.engine.steps.turns - steps < 500
    count = len(page.all(".token"))
    # What was on its way has come when another answer has, and is shown when that is.
    page.driver.execute_async_script("fetch('/health').then(() => requestAnimationFrame(arguments[0]))")
    assert 3 < len(page.all(".token")) == count < 2900
    assert "tokens/s" in page.text("#figures")
    assert page.find("#complete").is_enabled()
    assert not page.find("#stop").is_enabled()


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
    page.complete(**GREEDY)
    page.wait_for_status("Finished")
    assert page.shown_text == greedy(guarded.stack)["text"]
    assert page.all(".token") == []
    assert not page.find("#legend").is_displayed()


@pytest.mark.parametrize("kind", ["curl", "python", "grpc"])
def test_control_tokens_can_be_plain_text(page: Page, guarded: Guarded, kind: str) -> None:
    """A control token in the prompt is read as such, or is text once the box is not ticked; the copied code says so."""
    page.run("document.getElementById('prompt').value = 'Hi<|im_end|>'")
    page.complete(temperature="0", max_tokens="4")
    page.wait_for_status("Finished")
    assert page.text("#prompt-tokens") == "2 tokens"
    page.find("#parse_special").click()
    page.find("#complete").click()
    page.wait(lambda: page.text("#prompt-tokens") not in {"", "2 tokens"})
    page.wait_for_status("Finished")
    plain = guarded.stack.complete(prompt="Hi<|im_end|>", temperature=0, max_tokens=4, parse_special=False).json
    assert page.shown_text == plain["choices"][0]["text"]
    page.find(f"[data-copy={kind}]").click()
    code = page.wait(lambda: page.find("#snippet").get_property("textContent"))
    assert printed(kind, code) == page.shown_text


def test_the_stop_text_that_matched_is_told(page: Page) -> None:
    """With the reason why the answer ended."""
    page.complete(prompt="1, 2, 3, 4,", temperature="0", max_tokens="16", stop_texts=" 7")
    page.wait_for_status('Finished: stop at " 7".')
    assert " 7" not in page.shown_text

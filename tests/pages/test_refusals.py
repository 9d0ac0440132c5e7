"""What the playground shows instead of a completion: the service's own words, or that it is out of reach."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from tests.pages.expected import GREEDY, SCREENSHOTS, Guarded
from tests.support.stack import KEY

if TYPE_CHECKING:
    from tests.pages.chromium import Page

pytestmark = pytest.mark.browser
PIECE = {"choices": [{"index": 0, "text": "é😀\n\n", "logprobs": None, "finish_reason": None}]}
FAILURE = {"error": {"message": "It broke.", "type": "server_error", "param": None, "code": None}}


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
    page.complete()
    page.wait_for_status("Finished")
    assert not page.find("#error").is_displayed()


@pytest.mark.parametrize(
    ("field", "value", "sent"),
    [("temperature", "3", 3), ("max_tokens", "-1", -1), ("n", "many", "many"), ("top_p", "1,5", "1,5")],
)
def test_a_bad_value_is_refused_in_the_services_words(
    page: Page, guarded: Guarded, field: str, value: str, sent: Any
) -> None:
    """Whatever is typed goes to the service; its message is shown, and its field is marked and focused."""
    page.complete(**{**GREEDY, field: value})
    page.wait_for_status("Failed.")
    request = {"prompt": GREEDY["prompt"], "max_tokens": 24, "temperature": 0, field: sent}
    error = guarded.stack.complete(**request).json["error"]
    assert page.text("#error").startswith(error["message"])
    if error["param"] == field:
        assert page.find(f"#{field}").get_attribute("aria-invalid") == "true"
        assert page.focused == page.find(f"#{field}")
    else:
        assert isinstance(sent, str)


@pytest.mark.parametrize(
    ("end", "status", "message"),
    [
        ("data: [DONE]\n\n", "Finished", ""),
        (f"data: {json.dumps(FAILURE)}\n\n", "Failed.", "It broke."),
        ("", "Failed.", "The stream ended before its end."),
    ],
)
def test_streams_are_read_however_they_are_cut(page: Page, end: str, status: str, message: str) -> None:
    """Events that arrive byte by byte give their text; a failure in the middle, and a missing end, are told."""
    page.run(
        """
        const [text] = arguments;
        const start = (sink) => {
          for (const byte of new TextEncoder().encode(text)) sink.enqueue(Uint8Array.of(byte));
          sink.close();
        };
        const headers = { "content-type": "text/event-stream" };
        window.fetch = async () => new Response(new ReadableStream({ start }), { headers });
        """,
        f"data: {json.dumps(PIECE, ensure_ascii=False)}\n\n{end}",
    )
    page.find("#complete").click()
    page.wait_for_status(status)
    assert page.shown_text == "é😀\n\n"
    assert page.text("#error").startswith(message)
    assert page.find("#error").is_displayed() == bool(message)


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

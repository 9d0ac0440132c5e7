"""Metrics and log lines of requests through Envoy."""

from __future__ import annotations

import json
from typing import Any

import openai
from prometheus_client.parser import text_string_to_metric_families

from tests.support.patience import eventually
from tests.support.stack import AUTHORIZED, MODEL, Stack

NEW = 6


def scrape(stack: Stack) -> dict[tuple[str, str], float]:
    """All samples of the process and of its one model, by name and outcome, if they have one."""
    answer = Stack(stack.metrics, 0).request("GET", "/metrics", headers={})
    assert answer.status == 200
    return {
        (sample.name, sample.labels.get("outcome", "")): sample.value
        for family in text_string_to_metric_families(answer.body.decode())
        for sample in family.samples
        if set(sample.labels) <= {"model", "outcome"} and sample.labels.get("model") != ""
    }


def test_a_scrape_counts_what_was_asked(stack: Stack, client: openai.OpenAI) -> None:
    """Between two scrapes a whole answer and a stream: as many requests, and the tokens that their usage says."""
    eventually(lambda: stack.sample("llm_running") + stack.sample("llm_waiting") == 0)  # whatever was asked before
    before = scrape(stack)
    fields: dict[str, Any] = {"model": MODEL, "prompt": "One two three four five", "max_tokens": NEW, "temperature": 0}
    whole = client.completions.create(**fields, extra_body={"ignore_eos": True})
    assert whole.usage is not None
    pieces = client.completions.create(**fields, stream=True, extra_body={"ignore_eos": True})
    assert list(pieces)
    completed = "llm_requests_total", "completed"
    eventually(lambda: scrape(stack)[completed] == before[completed] + 2)
    after = scrape(stack)
    grown = {key: after[key] - before.get(key, 0) for key in after}
    assert grown["llm_prompt_tokens_total", ""] == 2 * whole.usage.prompt_tokens
    assert grown["llm_generation_tokens_total", ""] == 2 * NEW
    assert grown["llm_time_to_first_token_seconds_count", ""] == 2
    assert grown["llm_inter_token_latency_seconds_count", ""] == 2 * (NEW - 1)
    assert grown["llm_request_duration_seconds_sum", ""] > grown["llm_time_to_first_token_seconds_sum", ""] > 0
    assert after["llm_running", ""] == after["llm_waiting", ""] == 0
    assert after["process_resident_memory_bytes", ""] > 1 << 20


def test_the_log_has_one_line_for_a_request(stack: Stack) -> None:
    """The log line has the request's numbers, under the id that the caller got, and none of its text."""
    assert stack.logs is not None
    body = json.dumps({"model": MODEL, "prompt": "A secret zebra", "max_tokens": 3, "ignore_eos": True})
    answer = stack.request("POST", "/v1/completions", body, AUTHORIZED | {"content-type": "application/json"})
    assert answer.status == 200
    log = stack.logs / "service.log"

    def lines() -> list[str]:
        return [line for line in log.read_text().splitlines(keepends=True) if answer.headers["x-request-id"] in line]

    eventually(lambda: lines() and lines()[0].endswith("\n"))
    (line,) = map(json.loads, lines())
    assert (line["outcome"], line["code"], line["sequences"], line["completion_tokens"]) == ("completed", "OK", 1, 3)
    assert line["prompt_tokens"] == answer.json["usage"]["prompt_tokens"]
    assert 0 <= line["queue_seconds"] <= line["first_token_seconds"] <= line["seconds"]
    assert "zebra" not in log.read_text()

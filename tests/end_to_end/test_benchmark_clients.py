"""What the benchmark clients of vLLM and SGLang send to completions, and what they read of the answer.

Their packages need gigabytes, so the bodies are recorded: of `vllm bench serve --backend openai` and of
`sglang.bench_serving --backend sglang-oai`, as these projects' repositories have them, with options that users give.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.support.stack import MODEL, Stack

PROMPT = "Once upon a time there was"
VLLM = {
    "model": MODEL,
    "prompt": PROMPT,
    "repetition_penalty": 1.0,
    "max_tokens": 8,
    "logprobs": None,
    "stream": True,
    "stream_options": {"include_usage": True},
}
SGLANG = {
    "model": MODEL,
    "prompt": PROMPT,
    "temperature": 0.0,
    "best_of": 1,
    "max_tokens": 8,
    "stream": True,
    "ignore_eos": True,
}
BODIES: dict[str, dict[str, Any]] = {
    "vllm": VLLM,
    "vllm --ignore-eos": {**VLLM, "ignore_eos": True},
    "vllm --logprobs 5": {**VLLM, "logprobs": 5},
    # Its sampling options go into the body as they are.
    "vllm --temperature ...": {
        **VLLM,
        "temperature": 0.7,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.1,
        "frequency_penalty": 0.5,
        "presence_penalty": 0.5,
        "repetition_penalty": 1.1,
    },
    "vllm, prompt of ids": {**VLLM, "prompt": [5, 6, 7, 8], "ignore_eos": True},
    "sglang": SGLANG,
    "sglang --disable-ignore-eos": {**SGLANG, "ignore_eos": False},
}


@pytest.mark.parametrize("name", BODIES)
def test_a_streamed_body(stack: Stack, name: str) -> None:
    """Each event but the usage has a choice with a text, the usage counts what was asked for, and [DONE] is last."""
    body = BODIES[name]
    # Neither client names the type of its JSON by itself where it gives the body to its library.
    answer = stack.request("POST", "/v1/completions", json.dumps(body), {"x-request-id": "bench-1"})
    assert answer.status == 200
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done = answer.events
    assert done == "[DONE]"
    read = [json.loads(event) for event in events]
    pieces = [event["choices"][0]["text"] for event in read if event["choices"]]
    assert "".join(pieces)
    usages = [event["usage"] for event in read if not event["choices"]]
    assert len(usages) == ("stream_options" in body)
    if body.get("ignore_eos"):
        assert len(pieces) == body["max_tokens"]
        assert [usage["completion_tokens"] for usage in usages] == [body["max_tokens"]] * len(usages)


def test_a_body_that_does_not_stream(stack: Stack) -> None:
    """With `--disable-stream` SGLang's client reads the whole answer line by line, as one event."""
    answer = stack.request("POST", "/v1/completions", json.dumps({**SGLANG, "stream": False}))
    (line,) = answer.body.splitlines()
    read = json.loads(line.removeprefix(b"data: "))
    assert read["choices"][0]["text"]
    assert read["usage"]["completion_tokens"] == 8


def test_the_list_of_models(stack: Stack) -> None:
    """Both ask for it where no model is named, and take the first entry's id."""
    assert stack.request("GET", "/v1/models").json["data"][0]["id"]

"""gRPC and REST, unary and stream, idle and under load: the same request and seed give the same text."""

from __future__ import annotations

import json
import random
from concurrent.futures import ThreadPoolExecutor

from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from tests.support.stack import MODEL, Stack

REQUESTS = [
    {"prompt": "Once upon a time", "max_tokens": 16, "seed": 1},
    {"prompt": "Once upon a time", "max_tokens": 16, "seed": 1, "temperature": 1.7, "top_p": 0.8, "n": 2},
    {"prompt": "The sky is", "max_tokens": 12, "seed": -9, "top_k": 20, "min_p": 0.05, "logprobs": 2},
    {"prompt": "def f(x):\n", "max_tokens": 16, "seed": 3, "frequency_penalty": 1.5, "presence_penalty": -0.5},
    {"prompt": "1, 2, 3,", "max_tokens": 16, "temperature": 0, "stop": ["7"], "echo": True, "logprobs": 1},
    {"prompt": "A smiling face: 😀 and a flag:", "max_tokens": 24, "seed": 5, "temperature": 1.5, "logprobs": 0},
]


def texts(answer: dict) -> list[str]:
    return [choice["text"] for choice in answer["choices"]]


def streamed(stack: Stack, fields: dict) -> list[dict]:
    """The events of a streamed request, checked for the form of the stream."""
    answer = stack.complete(**fields, stream=True)
    assert answer.status == 200
    assert answer.headers["content-type"] == "text/event-stream"
    *events, done = answer.events
    assert done == "[DONE]"
    return [json.loads(event) for event in events]


def joined(events: list[dict], count: int) -> list[dict]:
    """The choices that a stream's pieces make."""
    choices: list[dict] = [{"text": "", "index": i, "logprobs": None, "finish_reason": None} for i in range(count)]
    for event in events:
        (piece,) = event["choices"]
        choice = choices[piece["index"]]
        assert choice["finish_reason"] is None
        choice["text"] += piece["text"]
        choice |= {name: piece[name] for name in ("finish_reason", "stop_reason") if name in piece}
        if piece["logprobs"] is not None:
            lists = choice["logprobs"] or {name: [] for name in piece["logprobs"]}
            choice["logprobs"] = {name: lists[name] + piece["logprobs"][name] for name in lists}
    return choices


def test_stream_equals_unary_over_rest(stack: Stack) -> None:
    """Joined streams equal unary answers in text, scores, offsets and reasons, for every kind of request."""
    for fields in REQUESTS:
        whole = stack.complete(**fields).json["choices"]
        assert joined(streamed(stack, fields), len(whole)) == whole
        assert not any("\ufffd" in text for text in texts({"choices": whole}))


def test_grpc_and_rest_give_the_same_text(stack: Stack, stub: completion_pb2_grpc.CompletionServiceStub) -> None:
    """The typed and the JSON door answer with the same texts."""
    for fields in REQUESTS:
        typed = {("text" if name == "prompt" else name): value for name, value in fields.items()}
        answer = stub.CreateCompletion(pb.CreateCompletionRequest(model=MODEL, **typed))
        assert [choice.text for choice in answer.choices] == texts(stack.complete(**fields).json)


def test_seeded_text_is_the_same_alone_and_among_others(stack: Stack) -> None:
    """A seeded request gives the same text and scores by itself and among 16 others that come and go."""
    request = {"prompt": "Once upon a time", "max_tokens": 24, "seed": 42, "temperature": 1, "logprobs": 1}
    alone = stack.complete(**request).json["choices"]
    pick = random.Random(0)

    def other(number: int) -> int:
        prompt = " ".join(pick.choices(["red", "green", "blue", "sea", "sky"], k=pick.randint(1, 60)))
        return stack.complete(prompt=prompt, max_tokens=pick.randint(1, 40), temperature=1, n=1 + number % 2).status

    with ThreadPoolExecutor(20) as pool:
        others = [pool.submit(other, number) for number in range(16)]
        same = [pool.submit(stack.complete, **request) for _ in range(3)]
        assert [answer.result().json["choices"] for answer in same] == [alone] * 3
        assert {answer.result() for answer in others} == {200}


def test_greedy_choices_are_identical(stack: Stack) -> None:
    """N choices at temperature 0 are the same text n times."""
    assert len(set(texts(stack.complete(prompt="The sky is", n=5, temperature=0, max_tokens=12).json))) == 1


def test_cached_prompt_gives_the_same_bits(stack: Stack) -> None:
    """A prompt met again is answered from the cache, counted as cached, with exactly the same scores."""
    prompt = "In a hole in the ground there lived a creature. " * 8
    first = stack.complete(prompt=prompt, max_tokens=8, temperature=0, logprobs=3).json
    again = stack.complete(prompt=prompt, max_tokens=8, temperature=0, logprobs=3).json
    assert again["choices"] == first["choices"]
    assert "prompt_tokens_details" not in first["usage"]
    cached = again["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert cached == first["usage"]["prompt_tokens"] - 2

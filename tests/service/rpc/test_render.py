"""Rendering: pieces to messages, and messages to OpenAI's JSON."""

from __future__ import annotations

import json

from completion.v1 import completion_pb2 as pb

from service.rpc import render
from service.rpc.status import error_message
from service.types import Delta, FinishReason, Token
from tests.support.fakes import request

SCORED = Token("b", 1, -0.5, (("b", -0.5), ("c", -1.25)))
FIRST = Token("a", 0, None, None)
WHOLE = render.Form(usage=True)


def delta(prompt_index, candidate, text, finish=None, **fields):
    values = {"tokens": (), "completion_tokens": len(text), "cached_tokens": 0, **fields}
    return Delta(prompt_index, candidate, text, finish_reason=finish, **values)


def answer(made, *deltas):
    whole = render.Answer(made)
    for each in deltas:
        whole.add(each)
    return whole.response()


def test_whole_answer():
    """Pieces are joined, choices are prompt-major, and usage counts each prompt once."""
    made = request("aaa", "bb", n=2)
    response = answer(
        made,
        delta(1, 0, "x"),
        delta(0, 1, "yy", FinishReason.STOP),
        delta(1, 0, "z", FinishReason.LENGTH, completion_tokens=2),
        delta(0, 0, "", FinishReason.STOP),
        delta(1, 1, "w", FinishReason.LENGTH),
    )
    assert [(choice.index, choice.text) for choice in response.choices] == [(0, ""), (1, "yy"), (2, "xz"), (3, "w")]
    assert [choice.finish_reason for choice in response.choices] == [pb.FINISH_REASON_STOP] * 2 + [
        pb.FINISH_REASON_LENGTH
    ] * 2
    assert (response.usage.prompt_tokens, response.usage.completion_tokens, response.usage.total_tokens) == (5, 5, 10)
    assert (response.id, response.object, response.model) == (made.id, "text_completion", made.model)
    assert all(choice.HasField("no_logprobs") for choice in response.choices)


def test_best_of_answers_the_likeliest():
    """The best `n` by mean log probability, equal ones in order; usage counts all."""
    made = request("a", "b", n=2, best_of=3)
    last = FinishReason.LENGTH
    means = {(0, 0): -3.0, (0, 1): -1.0, (0, 2): -2.0, (1, 0): -1.0, (1, 1): -1.0, (1, 2): -1.0}
    response = answer(made, *(delta(*key, f"{key[1]}", last, mean_logprob=mean) for key, mean in means.items()))
    assert [(choice.index, choice.text) for choice in response.choices] == [(0, "1"), (1, "2"), (2, "0"), (3, "1")]
    assert response.usage.completion_tokens == 6


def test_cached_tokens():
    """Tokens that candidates of one request share are not cached; without cached tokens the field is absent."""
    made = request("a" * 20, n=2)
    last = FinishReason.STOP
    response = answer(made, delta(0, 0, "", last, cached_tokens=18), delta(0, 1, "", last, cached_tokens=20))
    assert response.usage.prompt_tokens_details.cached_tokens == 18
    response = answer(made, delta(0, 0, "", last), delta(0, 1, "", last, cached_tokens=20))
    assert not response.usage.HasField("prompt_tokens_details")
    assert "prompt_tokens_details" not in render.response_json(response, WHOLE)["usage"]


def test_stream_messages():
    """Each piece is a message of one choice, with usage only when asked for."""
    pieces = render.Pieces(request("a", "b", n=2))
    message = pieces.message(delta(1, 0, "x"))
    assert [(choice.index, choice.text, choice.finish_reason) for choice in message.choices] == [(2, "x", 0)]
    assert not message.HasField("usage")
    pieces.message(delta(0, 1, "yy", FinishReason.STOP))
    last = pieces.usage_message()
    assert not last.choices
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (2, 3)


def test_continuous_usage():
    """Every message tells the usage so far."""
    pieces = render.Pieces(request("a", n=2, continuous_usage=True))
    deltas = [delta(0, 0, "x"), delta(0, 1, "y"), delta(0, 0, "z", completion_tokens=2)]
    assert [pieces.message(each).usage.completion_tokens for each in deltas] == [1, 2, 3]


def test_logprobs_json():
    """Four parallel lists; what nothing precedes is null; floats come out as they went in."""
    made = request("a", logprobs=1, echo=True)
    response = answer(made, delta(0, 0, "ab", FinishReason.LENGTH, tokens=(FIRST, SCORED)))
    assert render.response_json(response, WHOLE)["choices"] == [
        {
            "text": "ab",
            "index": 0,
            "logprobs": {
                "tokens": ["a", "b"],
                "token_logprobs": [None, -0.5],
                "top_logprobs": [None, {"b": -0.5, "c": -1.25}],
                "text_offset": [0, 1],
            },
            "finish_reason": "length",
        }
    ]


def test_logprobs_of_nothing_are_empty_lists():
    """Asked for, the object is there even where a choice has no token."""
    response = answer(request("a", logprobs=0), delta(0, 0, "", FinishReason.STOP))
    choice = render.response_json(response, WHOLE)["choices"][0]
    assert choice["logprobs"] == {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}


def test_unary_json_has_the_documented_shape():
    """Keys in OpenAI's order, numbers as numbers, null where nothing was asked for."""
    response = answer(request("a"), delta(0, 0, "é", FinishReason.STOP))
    assert render.body(response, WHOLE).decode() == (
        '{"id":"cmpl-0","object":"text_completion","created":0,"model":"alphabet",'
        '"choices":[{"text":"é","index":0,"logprobs":null,"finish_reason":"stop"}],'
        '"usage":{"prompt_tokens":1,"completion_tokens":1,"total_tokens":2}}'
    )


def events(data):
    assert data.startswith(b"data: ")
    assert data.endswith(b"\n\n")
    return json.loads(data[len(b"data: ") :])


def test_usage_key_of_events():
    """With include_usage every event has the key and the last one the totals; without it there is none."""
    pieces = render.Pieces(request("a"))
    message = pieces.message(delta(0, 0, "x"))
    assert events(render.event(message, WHOLE))["usage"] is None
    assert "usage" not in events(render.event(message, render.Form(usage=False)))
    assert events(render.event(message, render.Form(usage=False)))["choices"][0]["finish_reason"] is None
    total = events(render.event(pieces.usage_message(), WHOLE))
    assert total["choices"] == []
    assert total["usage"]["total_tokens"] == 2


def test_error_event():
    """All four keys, null where there is nothing."""
    assert events(render.error_event(error_message("Oh.", "server_error", None, "x"))) == {
        "error": {"message": "Oh.", "type": "server_error", "param": None, "code": "x"}
    }


def test_a_token_without_text_has_a_key_all_the_same():
    """Envoy's transcoder ends with a crash at a map whose key is not there, as an empty text would not be."""
    made = request("a", logprobs=1)
    token = Token("", 1, -0.5, (("", -0.5), ("c", -1.25)))
    message = render.Pieces(made).message(delta(0, 0, "", tokens=(token,)))
    read = pb.CreateCompletionResponse.FromString(message.SerializeToString())
    (top,) = read.choices[0].logprobs.top_logprobs
    assert [each.HasField("token") for each in top.alternatives.alternatives] == [True, True]

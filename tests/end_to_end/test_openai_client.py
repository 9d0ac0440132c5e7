"""The official Python client, unmodified, through the real Envoy to the real model."""

from __future__ import annotations

import math
from collections.abc import Callable

import openai
import pytest

from tests.support.stack import MODEL, Stack

PROMPT = "The capital of France is"
GREEDY = {"model": MODEL, "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
# What the model surely repeats.
LOOP = {"model": MODEL, "prompt": ("a b " * 15).rstrip(), "temperature": 0}


def test_unary_answer_has_every_field(client: openai.OpenAI) -> None:
    """A plain completion has OpenAI's fields with OpenAI's types."""
    answer = client.completions.create(**GREEDY)
    assert answer.id.startswith("cmpl-")
    assert answer.object == "text_completion"
    assert isinstance(answer.created, int)
    assert answer.model == MODEL
    (choice,) = answer.choices
    assert (choice.index, choice.finish_reason, choice.logprobs) == (0, "length", None)
    assert choice.text.startswith(" Paris")
    assert answer.usage.model_dump(exclude_none=True)["total_tokens"] == answer.usage.prompt_tokens + 8


def test_stream_joined_equals_unary(client: openai.OpenAI) -> None:
    """A stream's texts joined are the unary text; only the last piece has a finish reason."""
    whole = client.completions.create(**GREEDY).choices[0].text
    pieces = list(client.completions.create(**GREEDY, stream=True))
    assert "".join(piece.choices[0].text for piece in pieces) == whole
    assert [piece.choices[0].finish_reason for piece in pieces] == [None] * (len(pieces) - 1) + ["length"]
    assert len(pieces) > 3
    assert len({piece.id for piece in pieces}) == 1
    assert all(piece.usage is None for piece in pieces)


async def test_async_client(async_client: openai.AsyncOpenAI, client: openai.OpenAI) -> None:
    """The asynchronous client gets the same texts, whole and streamed."""
    expected = client.completions.create(**GREEDY).choices[0].text
    assert (await async_client.completions.create(**GREEDY)).choices[0].text == expected
    stream = await async_client.completions.create(**GREEDY, stream=True)
    assert "".join([piece.choices[0].text async for piece in stream]) == expected


def test_all_prompt_forms(client: openai.OpenAI) -> None:
    """Text, texts, tokens and token arrays that say the same are completed the same."""
    options = {"model": MODEL, "max_tokens": 6, "temperature": 0, "logprobs": 0, "echo": True}
    text = client.completions.create(prompt="Hello, world", **options)
    assert text.choices[0].text.startswith("Hello, world")
    # "Hello", ",", " world" in this vocabulary, read off the scored prompt.
    assert text.choices[0].logprobs.tokens[:3] == ["Hello", ",", " world"]
    tokens = [19556, 28, 905]
    for prompt in (["Hello, world"], tokens, [tokens]):
        other = client.completions.create(prompt=prompt, **options)
        assert other.choices[0].text == text.choices[0].text
        assert other.choices[0].logprobs == text.choices[0].logprobs


def test_batch_is_prompt_major(client: openai.OpenAI) -> None:
    """A batch of prompts with n gives n choices per prompt, in order, each as in a request of its own."""
    prompts = [PROMPT, "One, two, three,"]
    options = {"model": MODEL, "max_tokens": 5, "temperature": 0}
    batch = client.completions.create(prompt=prompts, n=2, **options)
    assert [choice.index for choice in batch.choices] == [0, 1, 2, 3]
    alone = [client.completions.create(prompt=prompt, **options) for prompt in prompts]
    texts = [answer.choices[0].text for answer in alone for _ in range(2)]
    assert [choice.text for choice in batch.choices] == texts
    assert batch.usage.prompt_tokens == sum(answer.usage.prompt_tokens for answer in alone)
    assert batch.usage.completion_tokens == 20


def test_missing_prompt_is_the_end_of_text_token(client: openai.OpenAI, stack: Stack) -> None:
    """No prompt, null and the empty string all continue the model's end-of-text token, one token long."""
    options = {"max_tokens": 4, "temperature": 0}
    answers = [stack.complete(**options), stack.complete(prompt=None, **options), stack.complete(prompt="", **options)]
    assert {answer.status for answer in answers} == {200}
    assert len({answer.json["choices"][0]["text"] for answer in answers}) == 1
    assert {answer.json["usage"]["prompt_tokens"] for answer in answers} == {1}


def test_logprobs(client: openai.OpenAI) -> None:
    """Scores come as parallel lists; the chosen token is among the alternatives with the very same float."""
    logprobs = client.completions.create(**GREEDY, logprobs=3).choices[0].logprobs
    assert "".join(logprobs.tokens) == client.completions.create(**GREEDY).choices[0].text
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob == max(top.values()) <= 0
        assert len(top) == 3
    starts = [len(PROMPT) + len("".join(logprobs.tokens[:i])) for i in range(8)]
    assert logprobs.text_offset == starts


def test_logprobs_zero_gives_the_chosen_token_alone(client: openai.OpenAI) -> None:
    """With logprobs=0 each position reports one token, the chosen one."""
    logprobs = client.completions.create(**{**GREEDY, "temperature": 1}, logprobs=0, seed=3).choices[0].logprobs
    assert [list(top) for top in logprobs.top_logprobs] == [[token] for token in logprobs.tokens]


def test_sampled_token_is_always_reported(client: openai.OpenAI) -> None:
    """An unlikely token that sampling chose is reported beside the likeliest: up to logprobs + 1 entries."""
    answer = client.completions.create(**{**GREEDY, "temperature": 2, "max_tokens": 24}, logprobs=2, seed=11)
    logprobs = answer.choices[0].logprobs
    sizes = [len(top) for top in logprobs.top_logprobs]
    assert set(sizes) == {2, 3} or set(sizes) == {3}
    for token, logprob, top in zip(logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True):
        assert top[token] == logprob


def test_echo_scores_the_prompt(client: openai.OpenAI) -> None:
    """max_tokens=0 with echo and logprobs scores the prompt and generates nothing; the first score is null."""
    answer = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=0, echo=True, logprobs=1)
    (choice,) = answer.choices
    assert choice.text == PROMPT
    assert choice.finish_reason == "length"
    assert answer.usage.completion_tokens == 0
    assert "".join(choice.logprobs.tokens) == PROMPT
    assert choice.logprobs.token_logprobs[0] is None
    assert choice.logprobs.top_logprobs[0] is None
    assert all(math.isfinite(logprob) and logprob < 0 for logprob in choice.logprobs.token_logprobs[1:])


def test_prompt_scores_agree_with_generated_scores(client: openai.OpenAI) -> None:
    """Scoring a text gives its tokens the scores that they had when they were generated.

    Nearly: 4-bit weights meet 8-bit activations, and rounding falls differently for one token than for many.
    """
    generated = client.completions.create(**GREEDY, logprobs=0).choices[0]
    scored = client.completions.create(
        model=MODEL, prompt=PROMPT + generated.text, max_tokens=0, echo=True, logprobs=0
    ).choices[0]
    assert scored.logprobs.tokens[-8:] == generated.logprobs.tokens
    assert scored.logprobs.token_logprobs[-8:] == pytest.approx(generated.logprobs.token_logprobs, abs=0.4)


def test_stop_text_ends_before_it(client: openai.OpenAI) -> None:
    """A stop text ends the choice right before it: not in the text, the scores or the count."""
    options = {"model": MODEL, "prompt": "1 2 3 4 5", "max_tokens": 20, "temperature": 0}
    answer = client.completions.create(**options, stop=[" 9", "never"], logprobs=1)
    (choice,) = answer.choices
    assert choice.text == " 6 7 8"
    assert choice.finish_reason == "stop"
    assert "".join(choice.logprobs.tokens) == choice.text
    assert answer.usage.completion_tokens == len(choice.logprobs.tokens)
    streamed = list(client.completions.create(**options, stop=" 9", stream=True))
    assert "".join(piece.choices[0].text for piece in streamed) == " 6 7 8"


def test_end_token_is_not_part_of_the_answer(client: openai.OpenAI) -> None:
    """An end token finishes with `stop`, in neither text nor scores nor count; ignore_eos goes on past it."""
    # A bias makes the end token certain; min_tokens holds it off for three tokens.
    options = {**GREEDY, "logprobs": 0, "logit_bias": {"2": 100}}
    answer = client.completions.create(**options, extra_body={"min_tokens": 3})
    (choice,) = answer.choices
    assert choice.finish_reason == "stop"
    assert choice.text.startswith(" Paris")
    assert "<|im_end|>" not in choice.text
    assert answer.usage.completion_tokens == len(choice.logprobs.tokens) == 3
    longer = client.completions.create(**options, extra_body={"ignore_eos": True})
    assert longer.choices[0].finish_reason == "length"
    assert longer.usage.completion_tokens == len(longer.choices[0].logprobs.tokens) == 8
    assert longer.choices[0].text == "".join(longer.choices[0].logprobs.tokens) == ""
    assert longer.choices[0].logprobs.top_logprobs[0].keys() == {"<|im_end|>"}
    shown = client.completions.create(**options, extra_body={"ignore_eos": True, "skip_special_tokens": False})
    assert shown.choices[0].text == "<|im_end|>" * 8


def test_control_tokens_in_a_text(client: openai.OpenAI) -> None:
    """The text of a control token in a prompt is that token, and on request ordinary text."""
    read = client.completions.create(model=MODEL, prompt="<|im_end|>", max_tokens=0)
    plain = {"parse_special": False}
    text = client.completions.create(model=MODEL, prompt="<|im_end|>", max_tokens=0, extra_body=plain)
    token = client.completions.create(model=MODEL, prompt=[2], max_tokens=0, echo=True)
    assert text.usage.prompt_tokens > 1
    assert read.usage.prompt_tokens == token.usage.prompt_tokens == 1
    assert token.choices[0].text == "<|im_end|>"


def test_seed_repeats_and_differs(client: openai.OpenAI) -> None:
    """The same seed gives the same text, other seeds other texts; n choices of one seed differ."""
    options = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 12, "temperature": 1}
    first, again = (client.completions.create(**options, seed=-5, n=3) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    assert client.completions.create(**options, seed=6).choices[0].text not in texts
    assert len({client.completions.create(**options).choices[0].text for _ in range(3)}) > 1


def test_best_of_answers_with_the_likeliest(client: openai.OpenAI) -> None:
    """best_of gives the n candidates of highest mean log probability, and bills all of them."""
    options = {"model": MODEL, "prompt": "Once upon a time", "max_tokens": 6, "seed": 2, "logprobs": 0}
    ignore = {"extra_body": {"ignore_eos": True}}
    every = client.completions.create(**options, n=4, **ignore)
    best = client.completions.create(**options, n=2, best_of=4, **ignore)

    def mean(choice: openai.types.CompletionChoice) -> float:
        return sum(choice.logprobs.token_logprobs) / len(choice.logprobs.token_logprobs)

    ranked = sorted(every.choices, key=mean, reverse=True)
    assert [choice.text for choice in best.choices] == [choice.text for choice in ranked[:2]]
    assert best.usage.completion_tokens == every.usage.completion_tokens == 24


def test_penalties_and_bias_change_the_text(client: openai.OpenAI, token_id: Callable[[str], int]) -> None:
    """Penalties keep a repeating model from repeating; a bias of -100 bans a token, one of 100 forces it."""
    loop = {**LOOP, "max_tokens": 12}
    plain = client.completions.create(**loop).choices[0].text
    assert plain == " a b" * 6
    assert client.completions.create(**loop, frequency_penalty=2).choices[0].text != plain
    assert client.completions.create(**loop, presence_penalty=2).choices[0].text != plain
    assert client.completions.create(**loop, extra_body={"repetition_penalty": 1.8}).choices[0].text != plain
    banned = client.completions.create(**loop, logit_bias={str(token_id(" a")): -100}).choices[0].text
    assert " a" not in banned
    forced = client.completions.create(**loop, logit_bias={str(token_id(" world")): 100}).choices[0].text
    assert forced == " world" * 12


def test_filters_that_leave_one_token_are_greedy(client: openai.OpenAI) -> None:
    """top_p=0, top_k=1 and min_p=1 keep only the likeliest token, at any temperature."""
    greedy = client.completions.create(**GREEDY).choices[0].text
    hot = {**GREEDY, "temperature": 2}
    assert client.completions.create(**hot, top_p=0).choices[0].text == greedy
    assert client.completions.create(**hot, extra_body={"top_k": 1}).choices[0].text == greedy
    assert client.completions.create(**hot, extra_body={"min_p": 1}).choices[0].text == greedy
    assert client.completions.create(**hot, seed=1).choices[0].text != greedy


def test_min_tokens_and_stop_token_ids(client: openai.OpenAI, token_id: Callable[[str], int]) -> None:
    """stop_token_ids end a choice like end tokens do, and min_tokens holds them off."""
    options = {**LOOP, "max_tokens": 8}
    stop = {"stop_token_ids": [token_id(" b")]}
    stopped = client.completions.create(**options, extra_body=stop)
    assert (stopped.choices[0].text, stopped.choices[0].finish_reason) == (" a", "stop")
    assert stopped.usage.completion_tokens == 1
    held = client.completions.create(**options, extra_body={**stop, "min_tokens": 3})
    assert held.usage.completion_tokens >= 3
    assert " b" not in held.choices[0].text


def test_usage_in_streams(client: openai.OpenAI) -> None:
    """include_usage ends the stream with the totals and no choice; continuous_usage_stats counts along."""
    pieces = list(client.completions.create(**GREEDY, stream=True, stream_options={"include_usage": True}))
    assert pieces[-1].choices == []
    assert pieces[-1].usage.completion_tokens == 8
    assert all(piece.usage is None for piece in pieces[:-1])
    options = {"include_usage": True, "continuous_usage_stats": True}
    counts = [
        piece.usage.completion_tokens
        for piece in client.completions.create(**GREEDY, stream=True, stream_options=options)
    ]
    assert counts == sorted(counts)
    assert counts[-1] == 8


def test_user_is_accepted(client: openai.OpenAI) -> None:
    """`user` changes nothing in the answer."""
    answer = client.completions.create(**GREEDY, user="someone")
    assert answer.choices[0].text == client.completions.create(**GREEDY).choices[0].text


def test_models(client: openai.OpenAI) -> None:
    """The model is listed under its id and its alias, and can be looked up by both."""
    names = [model.id for model in client.models.list()]
    assert {"SmolLM2-135M-Instruct", MODEL} <= set(names)
    for name in names:
        model = client.models.retrieve(name)
        assert (model.id, model.object, model.owned_by) == (name, "model", "HuggingFaceTB")
        assert model.max_model_len == 8192
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("organisation/nothing")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("fields", "error", "param", "code"),
    [
        ({"model": "nothing"}, openai.NotFoundError, None, "model_not_found"),
        ({"max_tokens": -1}, openai.BadRequestError, "max_tokens", "integer_below_min_value"),
        ({"temperature": 2.5}, openai.BadRequestError, "temperature", "decimal_above_max_value"),
        ({"max_tokens": 9000}, openai.BadRequestError, "prompt", "context_length_exceeded"),
        ({"suffix": "end"}, openai.BadRequestError, "suffix", "unsupported_parameter"),
        ({"best_of": 2, "stream": True}, openai.BadRequestError, "best_of", "invalid_value"),
    ],
)
def test_errors_are_the_right_exceptions(client, fields, error, param, code) -> None:
    """A refusal raises the client's own exception class with param, code and the request's id."""
    with pytest.raises(error) as caught:
        client.completions.create(**{**GREEDY, **fields})
    assert (caught.value.param, caught.value.code) == (param, code)
    assert caught.value.type == "invalid_request_error"
    assert caught.value.request_id


def test_wrong_integer_is_worded_like_the_real_api(client: openai.OpenAI) -> None:
    """The message names the field, the bound and what was given."""
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(**{**GREEDY, "max_tokens": -1})
    expected = "Invalid 'max_tokens': integer below minimum value. Expected a value >= 0, but got -1 instead."
    assert caught.value.body["message"] == expected


def test_no_key_is_needed_where_there_is_no_key_file(stack: Stack) -> None:
    """A request without a key is answered."""
    assert stack.request("GET", "/v1/models", headers={}).status == 200

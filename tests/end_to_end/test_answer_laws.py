"""Laws of what answers say, over generated requests and through the real Envoy."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from service.manifest import TOKENIZER_FILE, read
from service.text.tokenizer import Tokenizer
from tests.support.stack import Stack

VOCABULARY = 49152
PROMPTS = st.sampled_from(
    [
        "1, 2, 3,",
        "Once upon a time",
        "def f(x):\n    return",
        "Ünïcödé 日本語 👩‍👩‍👧:",
        "The capital of France is",
        " " * 9,
    ]
) | st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30)
SAMPLING = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**40), "temperature": st.sampled_from([0, 0.7, 1, 2]), "max_tokens": st.integers(1, 12)},
    optional={"top_p": st.sampled_from([0.5, 0.95]), "top_k": st.sampled_from([1, 50]), "min_p": st.just(0.05)},
)
IDS = st.lists(st.integers(0, 300) | st.integers(0, VOCABULARY - 1), min_size=1, max_size=128)


def law(examples: int, *strategies: st.SearchStrategy[Any]) -> Callable[[Callable[..., None]], None]:
    """Runs a check on generated values."""

    def run(check: Callable[..., None]) -> None:
        settings(
            max_examples=examples,
            deadline=None,
            database=None,
            print_blob=True,
            suppress_health_check=list(HealthCheck),
            phases=[Phase.generate],
        )(given(*strategies)(check))()

    return run


@pytest.fixture(scope="module")
def tokenizer(model_dir: Path) -> Tokenizer:
    manifest = read(model_dir)
    return Tokenizer(model_dir / TOKENIZER_FILE, manifest.special_tokens, manifest.vocab_size)


def choice(stack: Stack, **fields: Any) -> dict[str, Any]:
    answer = stack.complete(**fields)
    assert answer.status == 200, (fields, answer)
    found: dict[str, Any] = answer.json["choices"][0]
    return found


def test_scores_of_ids_are_those_of_logprobs(stack: Stack, tokenizer: Tokenizer) -> None:
    """Where both have a token, they have the same number; asking for them changes nothing else."""
    met = 0
    by_text = {tokenizer.token_text(index): index for index in range(VOCABULARY)}

    @law(30, PROMPTS, SAMPLING, IDS, st.integers(0, 5), st.booleans())
    def check(prompt: str, sampling: dict[str, Any], ids: list[int], count: int, echo: bool) -> None:
        nonlocal met
        fields = {"prompt": prompt, **sampling, "logprobs": count, "echo": echo}
        plain = choice(stack, **fields)
        likely = plain["logprobs"]["top_logprobs"][-1] if plain["logprobs"]["top_logprobs"] else {}
        asked = [*ids[:-6], *(by_text[text] for text in likely if text in by_text)]
        scored = choice(stack, **fields, logprob_token_ids=asked)
        by_id = scored["logprobs"].pop("token_id_logprobs")
        scored.pop("stop_reason", None)
        assert scored == plain
        assert len(by_id) == len(plain["logprobs"]["tokens"])
        for scores, top in zip(by_id, plain["logprobs"]["top_logprobs"], strict=True):
            assert (scores is None) == (top is None)
            for index, logprob in (scores or {}).items():
                text = tokenizer.token_text(int(index))
                if text in top and by_text[text] == int(index):
                    assert logprob == top[text]
                    met += 1

    assert met > 20


def test_a_truncated_prompt_is_its_last_tokens(stack: Stack) -> None:
    """Sent as ids: text, scores and usage are the same."""

    @law(30, PROMPTS, SAMPLING, st.integers(1, 20), st.booleans())
    def check(prompt: str, sampling: dict[str, Any], kept: int, echo: bool) -> None:
        fields = {**sampling, "echo": echo, "logprobs": 1, "return_token_ids": True}
        whole = choice(stack, prompt=prompt, max_tokens=0, return_token_ids=True)["prompt_token_ids"]
        cut = stack.complete(prompt=prompt, truncate_prompt_tokens=kept, **fields).json
        again = stack.complete(prompt=whole[-kept:], **fields).json
        assert cut["choices"][0]["prompt_token_ids"] == whole[-kept:]
        assert cut["usage"]["prompt_tokens"] == min(kept, len(whole))
        if kept < len(whole):
            assert cut["choices"] == again["choices"]

    fits = stack.complete(prompt=[5] * 9000, truncate_prompt_tokens=-1, max_tokens=8100, temperature=0, stop=["a"])
    assert fits.status == 200
    assert fits.json["usage"]["prompt_tokens"] == 92


def test_a_banned_word_never_appears(stack: Stack) -> None:
    """Neither as one token nor as any others: each ban takes what the model would have said before."""
    banned = 0

    @law(30, PROMPTS, SAMPLING, st.data())
    def check(prompt: str, sampling: dict[str, Any], data: st.DataObject) -> None:
        nonlocal banned
        fields = {"prompt": prompt, **sampling, "ignore_eos": True}
        words: list[str] = []
        for _ in range(3):
            text = choice(stack, **fields, bad_words=words)["text"]
            assert not any(word in text for word in words)
            text = text.replace("\ufffd", "")
            if not text:
                break
            start = data.draw(st.integers(0, len(text) - 1))
            words.append(text[start : start + data.draw(st.integers(1, 8))])
            banned += 1

    assert banned > 30


def test_a_stop_text_that_stays_follows_the_text_without_it(stack: Stack) -> None:
    """With `include_stop_str_in_output` the text is the text without it and then the stop text, whole and streamed."""
    stopped = 0

    @law(30, PROMPTS, SAMPLING, st.data())
    def check(prompt: str, sampling: dict[str, Any], data: st.DataObject) -> None:
        nonlocal stopped
        fields = {"prompt": prompt, **sampling}
        text = choice(stack, **fields)["text"]
        stops = ["never said"]
        if text:
            start = data.draw(st.integers(0, len(text) - 1))
            stops.append(text[start : start + data.draw(st.integers(1, 6))])
        without = choice(stack, **fields, stop=stops)
        kept = stack.complete(**fields, stop=stops, include_stop_str_in_output=True, logprobs=0)
        found = kept.json["choices"][0]
        assert found["text"] == without["text"] + (without.get("stop_reason") or "")
        assert found.get("stop_reason") == without.get("stop_reason")
        assert kept.json["usage"]["completion_tokens"] == len(found["logprobs"]["tokens"])
        stopped += "stop_reason" in without

    assert stopped > 10


def test_ids_through_detokenize_are_the_text(stack: Stack) -> None:
    """That with `skip_special_tokens: false`, without a character that the last token leaves unfinished."""
    shown = 0

    @law(30, PROMPTS, SAMPLING, st.booleans())
    def check(prompt: str, sampling: dict[str, Any], ignore_eos: bool) -> None:
        nonlocal shown
        fields = {"prompt": prompt, **sampling, "ignore_eos": ignore_eos, "skip_special_tokens": False}
        found = choice(stack, **fields, return_token_ids=True)
        answer = stack.request("POST", "/detokenize", json.dumps({"tokens": found["token_ids"]}))
        assert answer.status == 200, (found, answer)
        text = answer.json["prompt"]
        assert found["text"] in {text, text.removesuffix("\ufffd")}
        shown += bool(text)

    assert shown > 20

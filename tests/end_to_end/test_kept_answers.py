"""What is kept of answers changes none, through the real Envoy: one caller has it kept, another has it computed."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from gguf import GGMLQuantizationType
from hypothesis import strategies as st

from model_export.export import Options, export
from service.host import kernels
from tests.end_to_end.test_answer_laws import law
from tests.model_export import tiny
from tests.support.stack import MODEL, Stack, launched

KERNELS = [
    "stock",
    pytest.param("own", marks=pytest.mark.skipif(kernels.why_not() is not None, reason=str(kernels.why_not()))),
]
IDS = st.lists(st.integers(0, tiny.VOCAB - 1), min_size=1, max_size=20)
# Worth keeping when their slots are needed.
PROMPTS = st.lists(st.integers(0, tiny.VOCAB - 1), min_size=16, max_size=30)
SAMPLING = st.fixed_dictionaries(
    {"seed": st.integers(0, 2**40), "temperature": st.sampled_from([0, 1, 2]), "max_tokens": st.integers(1, 12)},
    optional={"n": st.just(2), "logit_bias": st.just({"7": 9}), "allowed_token_ids": st.just([5, 6, 7, 8])},
)
SCORES = {"echo": True, "logprobs": 2, "max_tokens": 0, "temperature": 0}


class Served:
    """A small model, and callers: each example's own, for whom all is kept, and such who have never asked."""

    def __init__(self, stack: Stack, *, own: bool) -> None:
        self.stack = stack
        self.own = own
        self.numbers = itertools.count()
        self.caller = ""

    def begin(self) -> None:
        """Another caller asks from now on."""
        self.caller = f"caller {next(self.numbers)}"

    def answer(self, key: str, fields: dict[str, Any]) -> tuple[list[dict[str, Any]], int]:
        """The choices, and how many tokens of the prompt were cached."""
        headers = {"authorization": f"Bearer {key}", "content-type": "application/json"}
        body = {"model": MODEL, "ignore_eos": True, "return_token_ids": True, **fields}
        answer = self.stack.request("POST", "/v1/completions", json.dumps(body), headers)
        assert answer.status == 200, (fields, answer.body)
        usage = answer.json["usage"]
        return answer.json["choices"], usage.get("prompt_tokens_details", {}).get("cached_tokens", 0)

    def asked(self, **fields: Any) -> tuple[list[dict[str, Any]], int]:
        """An answer that is the same for one who has never asked, and what was cached for the caller."""
        choices, cached = self.answer(self.caller, fields)
        assert self.answer(f"new {next(self.numbers)}", fields) == (choices, 0), fields
        return choices, cached


@pytest.fixture(scope="module", params=KERNELS)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder, own = tmp_path_factory.mktemp("kept"), request.param == "own"
    unused = -tiny.VOCAB % 32  # own kernels take vocabularies of a multiple of 32
    source = tiny.gguf(folder / "Tiny.gguf", GGMLQuantizationType.Q4_1, unused_tokens=unused)
    form = {"kernels": "own"} if own else {"kernels": "stock", "quantization": "float32"}
    options = Options(**{"aliases": (MODEL,), "max_kl": 1.0, **form})  # type: ignore[arg-type]
    export(source, folder / "model", options, lambda *_: lambda: None)
    with launched(folder / "model") as stack:
        yield Served(stack, own=own)


def common(one: list[int], other: list[int]) -> int:
    """The length of the common beginning."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, (a, b) in pairs if a != b), min(len(one), len(other)))


def test_a_conversation_goes_on(served: Served) -> None:
    """With own kernels the next turn finds all of the answer but its last token, else the prompt."""

    @law(20, PROMPTS, SAMPLING, st.lists(IDS, min_size=2, max_size=2), st.booleans())
    def check(prompt: list[int], sampling: dict[str, Any], turns: list[list[int]], scored: bool) -> None:
        served.begin()
        for turn in turns:
            (choice, *others), _ = served.asked(prompt=prompt, **sampling, **({"logprobs": 1} if scored else {}))
            answered = [*prompt, *choice["token_ids"]]
            _, cached = served.asked(prompt=[*answered, *turn, 1], max_tokens=1, temperature=0)
            # Of several choices the second may take the slot of the first: it is not worth another for so few tokens.
            computed = len(answered) - 1 if served.own and not others else len(prompt)
            assert computed <= cached <= len(answered) + len(turn)
            assert cached <= len(prompt) or served.own
            prompt = [*answered, *turn, 1]


def test_scores_of_a_shared_context(served: Served) -> None:
    """Continuations of one context: with own kernels its scores are computed once, and the same numbers each time."""

    @law(10, PROMPTS, st.lists(IDS, min_size=3, max_size=3))
    def check(context: list[int], continuations: list[list[int]]) -> None:
        served.begin()
        served.asked(prompt=[*context, 3, 3], **SCORES)
        for continuation in continuations:
            prompt = [*context, *continuation, 4, 5]
            _, cached = served.asked(prompt=prompt, **SCORES)
            assert len(context) - 1 <= cached < len(prompt) - 1 if served.own else cached == 0
            _, again = served.asked(prompt=prompt, **{**SCORES, "logprobs": 1, "max_tokens": 3})
            assert again == (len(prompt) - 2 if served.own else 0)
        for more in ({"logprobs": 3}, {"logprob_token_ids": [7]}):
            assert served.asked(prompt=prompt, **{**SCORES, **more})[1] == 0


def test_scores_of_an_answer(served: Served) -> None:
    """An echo of prompt and answer has the numbers that came with the answer, computed or kept."""

    @law(10, PROMPTS, SAMPLING)
    def check(prompt: list[int], sampling: dict[str, Any]) -> None:
        served.begin()
        (choice, *others), _ = served.asked(prompt=prompt, **{**SCORES, **sampling})
        whole = [*prompt, *choice["token_ids"]]
        (again,), cached = served.asked(prompt=whole, **SCORES)
        least = len(whole) - 2 if served.own and not others else len(prompt) - 1
        assert least <= cached <= len(whole) - 2 if served.own else cached == 0
        if served.own:
            assert again["logprobs"]["token_logprobs"] == choice["logprobs"]["token_logprobs"]

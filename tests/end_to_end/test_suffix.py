"""Filling in the middle with models that have the tokens for it, through both doors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import grpc
import openai
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from model_export.export import Options, export
from service.settings import Settings
from tests.model_export import tiny
from tests.model_export.extended import extend
from tests.support.ports import free_ports
from tests.support.stack import AUTHORIZED, KEY, MODEL, ServiceThread, Stack, envoy

PREFIX, SUFFIX, MIDDLE, END = range(tiny.VOCAB, tiny.VOCAB + 4)
THE, TH = tiny.TOKENS.index("the"), tiny.TOKENS.index("th")
GREEDY = {"temperature": 0, "max_tokens": 12, "logprobs": 2}


@dataclass(frozen=True)
class Filling:
    """A served model, and its prompt for "the", a gap, and "thth"."""

    stack: Stack
    ids: Sequence[int]


@pytest.fixture(
    scope="module",
    params=[
        ("psm", "float32", (PREFIX, THE, SUFFIX, TH, TH, MIDDLE)),
        ("spm", "float16", (SUFFIX, TH, TH, PREFIX, THE, MIDDLE)),
    ],
    ids=["psm", "spm"],
)
def filling(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Filling]:
    """A tiny model of each order, exported and served behind a real Envoy."""
    order, form, ids = request.param
    folder = tmp_path_factory.mktemp(order)
    source = extend(tiny.hugging_face(folder / "Tiny"), "<fim_prefix>", "<fim_suffix>", "<fim_middle>", "<file_sep>")
    options = Options(aliases=(MODEL,), quantization=form, fim_order=order, max_kl=0.05)
    export(source, folder / "model", options, lambda label, total: lambda: None)
    http_port, grpc_port = free_ports(2)
    settings = Settings(model_dir=folder / "model", port=grpc_port, max_running=2, drain_seconds=1)
    with ServiceThread(settings), envoy(http_port, grpc_port, folder):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield Filling(stack, ids)


def test_suffix_over_rest(filling: Filling) -> None:
    """A prompt with a suffix is the model's own marks around both: the same choice, to the bit, and the same usage."""
    filled = filling.stack.complete(prompt="the", suffix="thth", **GREEDY).json
    told = filling.stack.complete(prompt=list(filling.ids), **GREEDY).json
    (choice,), (expected,) = filled["choices"], told["choices"]
    assert choice["text"] == expected["text"]
    assert choice["finish_reason"] == expected["finish_reason"]
    assert choice["logprobs"]["token_logprobs"] == expected["logprobs"]["token_logprobs"]
    assert choice["logprobs"]["text_offset"][0] == len("the")
    assert filled["usage"]["prompt_tokens"] == told["usage"]["prompt_tokens"] == len(filling.ids)
    assert filled["usage"]["completion_tokens"] == told["usage"]["completion_tokens"]
    assert choice["text"] != filling.stack.complete(prompt="the", **GREEDY).json["choices"][0]["text"]


def test_suffix_over_grpc(filling: Filling) -> None:
    """A typed caller gets what a REST caller gets, whole and as a stream."""
    wanted = filling.stack.complete(prompt="the", suffix="thth", temperature=0, max_tokens=12).json
    message = pb.CreateCompletionRequest(model=MODEL, text="the", suffix="thth", temperature=0, max_tokens=12)
    with grpc.insecure_channel(filling.stack.grpc_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        metadata = tuple(AUTHORIZED.items())
        whole = stub.CreateCompletion(message, metadata=metadata)
        pieces = list(stub.StreamCompletion(message, metadata=metadata))
    text = wanted["choices"][0]["text"]
    assert whole.choices[0].text == text
    assert "".join(choice.text for piece in pieces for choice in piece.choices) == text
    assert whole.usage.prompt_tokens == len(filling.ids)


def test_suffix_of_the_official_client(filling: Filling) -> None:
    """The official client's `suffix` goes with batches, tokens, seeds and streams."""
    with openai.OpenAI(base_url=filling.stack.base_url, api_key=KEY, max_retries=0) as client:
        batch = client.completions.create(
            model=MODEL, prompt=["the", "the"], suffix="thth", max_tokens=4, temperature=0
        )
        assert batch.usage is not None
        assert batch.usage.prompt_tokens == 2 * len(filling.ids)
        assert batch.choices[0].text == batch.choices[1].text
        sampled = {"model": MODEL, "prompt": [THE], "suffix": "thth", "max_tokens": 4, "seed": 5, "temperature": 1}
        whole = client.completions.create(**sampled)
        events = client.completions.create(**sampled, stream=True)
        assert "".join(event.choices[0].text for event in events) == whole.choices[0].text


def test_end_of_the_middle(filling: Filling) -> None:
    """The end-of-middle token ends the completion and is not in its text."""
    answer = filling.stack.complete(prompt="the", suffix="th", logit_bias={str(END): 100}, temperature=0).json
    (choice,) = answer["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert answer["usage"]["completion_tokens"] == 0


def test_echo_with_a_suffix_is_refused(filling: Filling) -> None:
    """There is no one text to give back."""
    answer = filling.stack.complete(prompt="the", suffix="th", echo=True)
    assert answer.status == 400
    assert answer.json["error"]["param"] == "suffix"

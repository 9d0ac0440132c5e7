"""Each family: a tiny model of its real architecture, exported and served, says what transformers says."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from model_export.export import Options, export
from service.settings import Settings
from service.text.tokenizer import Tokenizer
from tests.families.families import FAMILIES
from tests.families.family import Family
from tests.families.oracle import Continuation, Oracle, make
from tests.support.stack import ServiceThread, free_ports

pytestmark = pytest.mark.families

CHUNKS = {"chunked": 16, "whole": 4096}
NEW_TOKENS = 12
TOP = 5
CALLERS = itertools.count()

TEXTS = [
    "A",
    "The other hour, in there",
    "an ounce of weather is worth more than the rain; so they say, 12 times",
    "Sailors thought that the sea began where the naïve maps end 🚢, and an older one laughed at them all for it.",
]


@dataclass(frozen=True)
class Served:
    """A family's model in transformers, and running services of it, by their prefill chunk size."""

    family: Family
    tokenizer: Tokenizer
    expected: list[Continuation]
    ids: list[list[int]]
    stubs: dict[str, completion_pb2_grpc.CompletionServiceStub]

    def ask(self, reading: str, texts: Sequence[str]) -> list[pb.Choice]:
        """The greedy completions of the texts in one batch, with log probabilities of the prompts, for a new caller."""
        request = pb.CreateCompletionRequest(
            model="tiny",
            texts=pb.TextBatch(texts=texts),
            max_tokens=NEW_TOKENS,
            temperature=0,
            logprobs=TOP,
            echo=True,
            ignore_eos=True,
            skip_special_tokens=False,
        )
        key = [("authorization", f"Bearer caller-{next(CALLERS)}")]  # no caller reuses another's prompts
        return list(self.stubs[reading].CreateCompletion(request, metadata=key).choices)


@pytest.fixture(scope="module", params=FAMILIES, ids=str)
def served(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """Each family, made, exported and served."""
    folder, family = tmp_path_factory.mktemp(request.param.name), request.param
    source = make(family, folder / "source")
    oracle = Oracle(source)
    ids = [oracle.ids(text) for text in TEXTS]
    model = folder / "model"
    export(source, model, Options(id="tiny", quantization="float32"), lambda label, total: lambda: None)
    with ExitStack() as stack:
        stubs = {}
        for reading, chunk in CHUNKS.items():
            service, stubs[reading] = serve(stack, model, chunk)
        yield Served(
            family,
            service.server.models[0].tokenizer,
            [oracle.continuation(prompt, NEW_TOKENS) for prompt in ids],
            ids,
            stubs,
        )


def serve(stack: ExitStack, model: Path, chunk: int) -> tuple[ServiceThread, completion_pb2_grpc.CompletionServiceStub]:
    """A real server of the model with that prefill chunk size, until the stack ends."""
    (port,) = free_ports(1)
    settings = Settings(
        model_dir=model, port=port, metrics_port=0, max_running=8, prompt_chunk=chunk, threads=2, drain_seconds=0
    )
    service = stack.enter_context(ServiceThread(settings))
    channel = stack.enter_context(grpc.insecure_channel(f"127.0.0.1:{port}"))
    return service, completion_pb2_grpc.CompletionServiceStub(channel)


def check(served: Served, choice: pb.Choice, expected: Continuation, prompt: int) -> None:
    """A choice has the expected tokens, each with the expected log probability and alternatives."""
    scores, tolerance = choice.logprobs, served.family.tolerance
    assert list(scores.tokens)[prompt:] == [served.tokenizer.token_text(index) for index in expected.tokens[prompt:]]
    chosen = [score.logprob for score in scores.token_logprobs[1:]]
    wanted = expected.logprobs[np.arange(len(chosen)), expected.tokens[1:]]
    np.testing.assert_allclose(chosen, wanted, atol=tolerance, rtol=0)
    shown = [token or name(served, index) for token, index in zip(scores.tokens, expected.tokens, strict=True)]
    for top, token, row in zip(scores.top_logprobs[1:], shown[1:], expected.logprobs, strict=True):
        check_rivals(served, {each.token: each.score.logprob for each in top.alternatives.alternatives}, token, row)


def name(served: Served, index: int) -> str:
    """What a token is called among alternatives: its text, or its id where it has none."""
    return served.tokenizer.token_text(index) or f"token_id:{index}"


def check_rivals(served: Served, top: dict[str, float], token: str, row: np.ndarray) -> None:
    """The alternatives of `token`, by name, are the likeliest tokens of `row`, with their log probabilities."""
    by_name: dict[str, float] = {}
    for index in np.argsort(row):
        by_name[name(served, index)] = float(row[index])
    del by_name[token], top[token]
    assert top == pytest.approx({name: by_name[name] for name in top}, abs=served.family.tolerance)
    likeliest = sorted(by_name.values(), reverse=True)[: len(top)]
    np.testing.assert_allclose(sorted(top.values(), reverse=True), likeliest, atol=served.family.tolerance, rtol=0)
    assert len(top) >= TOP - 3  # some tokens have the same name, for example a letter and its byte


def test_texts_become_the_same_tokens(served: Served) -> None:
    """A text prompt has the ids that transformers' tokenizer gives it, with a beginning token or without."""
    assert [list(served.tokenizer.prompt(text).token_ids) for text in TEXTS] == served.ids


@pytest.mark.parametrize("reading", CHUNKS)
def test_alone(served: Served, reading: str) -> None:
    """A single prompt has transformers' greedy tokens and log probabilities, those of the prompt included."""
    for text, ids, expected in zip(TEXTS, served.ids, served.expected, strict=True):
        (choice,) = served.ask(reading, [text])
        check(served, choice, expected, len(ids))


@pytest.mark.parametrize("reading", CHUNKS)
def test_in_a_ragged_batch(served: Served, reading: str) -> None:
    """Prompts of different lengths in one batch have the same tokens and bit-equal log probabilities as each alone."""
    choices = served.ask(reading, TEXTS)
    for text, ids, expected, choice in zip(TEXTS, served.ids, served.expected, choices, strict=True):
        check(served, choice, expected, len(ids))
        (alone,) = served.ask(reading, [text])
        assert choice.logprobs == alone.logprobs


def test_chunks_leave_no_trace(served: Served) -> None:
    """Splitting a prompt into chunks changes no bit of the results."""
    whole, chunked = (served.ask(reading, TEXTS) for reading in ("whole", "chunked"))
    assert whole == chunked

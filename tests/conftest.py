"""Shared by all tests: the exported default model and one running stack."""

from __future__ import annotations

import fcntl
import os
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path

import grpc
import openai
import pytest
import tokenizers
from completion.v1 import completion_pb2_grpc

from deploy import local
from tests.support.stack import AUTHORIZED, KEY, Stack, launched

# Whatever imports onnxruntime, here or in what tests start.
os.environ["ORT_DISABLE_TELEMETRY"] = "1"


@pytest.fixture(scope="session")
def model_dir() -> Path:
    """The default model, exported as `make run` does it if it does not exist; only one process of a run exports it."""
    local.DEFAULT_MODEL_DIR.parent.mkdir(exist_ok=True)
    with (local.DEFAULT_MODEL_DIR.parent / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return local.model_dir(local.Options.from_environment())


@pytest.fixture(scope="session")
def stack(model_dir: Path) -> Iterator[Stack]:
    """Service and real Envoy on free ports, shared by all end-to-end tests."""
    with launched(model_dir) as running:
        yield running


@pytest.fixture(scope="session")
def token_id(model_dir: Path) -> Callable[[str], int]:
    """The id of a text that is one token of the default model."""
    tokenizer = tokenizers.Tokenizer.from_file(str(model_dir / "tokenizer.json"))

    def lookup(text: str) -> int:
        (index,) = tokenizer.encode(text).ids
        return int(index)

    return lookup


@pytest.fixture(scope="session")
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    """The official client; only its address and key are changed."""
    with openai.OpenAI(base_url=stack.base_url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
async def async_client(stack: Stack) -> AsyncIterator[openai.AsyncOpenAI]:
    """The official asynchronous client."""
    async with openai.AsyncOpenAI(base_url=stack.base_url, api_key=KEY, max_retries=0) as made:
        yield made


@pytest.fixture(scope="session")
def stub(stack: Stack) -> Iterator[completion_pb2_grpc.CompletionServiceStub]:
    """A typed gRPC client of the service, authorized by its channel's interceptor."""
    with grpc.insecure_channel(stack.grpc_address) as channel:
        yield completion_pb2_grpc.CompletionServiceStub(grpc.intercept_channel(channel, _WithKey()))


class _WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the key to every call that brings no metadata of its own."""

    def intercept_unary_unary(self, continuation, client_call_details, request):
        return continuation(self._authorized(client_call_details), request)

    def intercept_unary_stream(self, continuation, client_call_details, request):
        return continuation(self._authorized(client_call_details), request)

    @staticmethod
    def _authorized(details):
        if details.metadata is not None:
            return details
        return details._replace(metadata=list(AUTHORIZED.items()))

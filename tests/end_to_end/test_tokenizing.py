"""The routes of tokenizing have the rules of completions: keys, query, methods, encodings, types, sizes and errors."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from service.settings import Settings
from tests.support.ports import free_ports
from tests.support.stack import AUTHORIZED, KEY, MODEL, Answer, ServiceThread, Stack, envoy

JSON = {**AUTHORIZED, "content-type": "application/json"}
LIMITED = {"authorization": "Bearer limited-key"}
POSTED = {"/tokenize": {"prompt": "Hi<|im_end|>"}, "/detokenize": {"tokens": [26843, 2]}}
ANSWERS = {
    "/tokenize": {"count": 2, "max_model_len": 8192, "tokens": [26843, 2], "token_strs": None, "offsets": []},
    "/detokenize": {"prompt": "Hi<|im_end|>"},
}
ROUTES = [*POSTED, "/tokenizer_info"]


@pytest.fixture(scope="module")
def guarded(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A stack that requires keys, one of which may use no model that is served."""
    folder = tmp_path_factory.mktemp("tokenizing")
    keys = folder / "keys"
    lines = [f"{hashlib.sha256(KEY.encode()).hexdigest()} tests"]
    lines.append(f"{hashlib.sha256(b'limited-key').hexdigest()} limited models=another")
    keys.write_text("\n".join(lines) + "\n")
    http_port, grpc_port = free_ports(2)
    settings = Settings(model_dir=model_dir, port=grpc_port, api_keys_file=keys, drain_seconds=1)
    with ServiceThread(settings), envoy(http_port, grpc_port, folder, api_keys_file=keys):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield stack


def ask(stack: Stack, path: str, headers: dict[str, str] = JSON, **fields: object) -> Answer:
    """The route's own request, with other fields."""
    if path == "/tokenizer_info":
        return stack.request("GET", path, headers=headers)
    return stack.request("POST", path, json.dumps({**POSTED[path], **fields}), headers)


def refused(answer: Answer, status: int, says: str) -> None:
    """Checks an error's status, form and words."""
    assert answer.status == status, answer.body
    assert set(answer.json["error"]) == {"message", "type", "param", "code"}
    assert says in answer.json["error"]["message"]
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize("path", ROUTES)
def test_keys(guarded: Stack, path: str) -> None:
    """Without a key Envoy refuses; with a wrong one the service does; a key without a model finds none."""
    refused(ask(guarded, path, {"content-type": "application/json"}), 401, "You didn't provide an API key")
    refused(ask(guarded, path, {"authorization": "Bearer wrong"}), 401, "Incorrect API key provided")
    refused(ask(guarded, path, LIMITED), 404, "does not exist or you do not have access to it")
    assert ask(guarded, path).status == 200


@pytest.mark.parametrize("path", ROUTES)
def test_paths_queries_and_methods(guarded: Stack, path: str) -> None:
    """A trailing slash and an empty query pass; any other query, and another method, do not."""
    for same in (path, f"{path}/", f"/{path}", f"{path}?"):
        method, body = ("GET", None) if path == "/tokenizer_info" else ("POST", json.dumps(POSTED[path]))
        assert guarded.request(method, same, body, JSON).status == 200, same
    method = "GET" if path == "/tokenizer_info" else "POST"
    refused(guarded.request(method, f"{path}?model=x", "{}" if method == "POST" else None), 400, "Query parameters")
    others = {"POST", "PUT", "DELETE"} if method == "GET" else {"GET", "HEAD", "PUT", "DELETE"}
    for other in sorted(others):
        answer = guarded.request(other, path)
        assert (answer.status, answer.headers["allow"]) == (405, "GET, HEAD" if method == "GET" else "POST"), other
        if other != "HEAD":
            refused(answer, 405, "Not allowed.")


def test_head(guarded: Stack) -> None:
    """HEAD is answered where GET is, with its headers."""
    got, head = (guarded.request(method, "/tokenizer_info") for method in ("GET", "HEAD"))
    assert (head.status, head.body) == (200, b"")
    assert head.headers["content-length"] == str(len(got.body))


@pytest.mark.parametrize("path", POSTED)
def test_bodies(guarded: Stack, path: str) -> None:
    """Compressed and form-encoded bodies are refused, as is one above 2 MiB; one without a type is read."""
    body = json.dumps(POSTED[path])
    assert guarded.request("POST", path, body).json == ANSWERS[path]
    zipped = guarded.request("POST", path, gzip.compress(body.encode()), {**JSON, "content-encoding": "gzip"})
    refused(zipped, 415, "Compressed bodies")
    form = {**AUTHORIZED, "content-type": "application/x-www-form-urlencoded"}
    refused(guarded.request("POST", path, "prompt=x", form), 415, "as JSON")
    refused(guarded.request("POST", path, " " * (2 << 20) + body, JSON), 413, "2 MiB")
    assert guarded.request("POST", path, "{", JSON).status == 400
    assert guarded.request("POST", path, "[]", JSON).status == 400


@pytest.mark.parametrize("path", POSTED)
def test_models(guarded: Stack, path: str) -> None:
    """The model may be named or left out; an empty or unknown name is refused as in completions."""
    assert ask(guarded, path, model=MODEL).json == ask(guarded, path, model=None).json == ANSWERS[path]
    refused(ask(guarded, path, model=""), 400, "you must provide a model parameter")
    refused(ask(guarded, path, model="nothing"), 404, "The model `nothing` does not exist")


def test_words_that_completions_look_for(guarded: Stack) -> None:
    """A text that speaks of streams, or has escapes, is tokenized like any other."""
    for prompt in ('"stream": true', "\u00e9\u2028"):
        told = ask(guarded, "/tokenize", prompt=prompt).json
        assert ask(guarded, "/detokenize", tokens=told["tokens"]).json == {"prompt": prompt}


def test_sizes(guarded: Stack) -> None:
    """What is far too large is refused by its size; a text that is longer than the context is not."""
    refused(ask(guarded, "/tokenize", prompt="x" * 2_000_000), 400, "2000000 characters, more than the 65536")
    refused(ask(guarded, "/detokenize", tokens=[1] * 600_000), 400, "at most 262144 token ids, but got 600000")
    refused(ask(guarded, "/tokenize", prompt=[{"tokens": [1] * 600_000}]), 400, "at most 262144 token ids")
    refused(ask(guarded, "/tokenize", prompt=[{"text": ""}] * 10_000), 400, "at most 8192 parts, but got 10000")
    told = ask(guarded, "/tokenize", prompt="😀" * 32_768, return_token_strs=True).json
    assert told["count"] == len(told["token_strs"]) == len(told["offsets"]) > 8192 * 8
    assert ask(guarded, "/detokenize", tokens=told["tokens"]).json == {"prompt": "😀" * 32_768}


def test_over_grpc(guarded: Stack) -> None:
    """Typed callers get the same through Envoy, with the same refusals."""
    metadata = tuple(AUTHORIZED.items())
    with grpc.insecure_channel(guarded.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        assert list(stub.Tokenize(pb.TokenizeRequest(text="Hi<|im_end|>"), metadata=metadata).tokens) == [26843, 2]
        assert stub.Detokenize(pb.DetokenizeRequest(tokens=[26843, 2]), metadata=metadata).prompt == "Hi<|im_end|>"
        info = stub.GetTokenizer(pb.GetTokenizerRequest(model=MODEL), metadata=metadata)
        assert info.chat_template == guarded.request("GET", "/tokenizer_info").json["chat_template"]
        with pytest.raises(grpc.RpcError) as caught:
            stub.GetTokenizer(pb.GetTokenizerRequest(model="nothing"), metadata=metadata)
        assert caught.value.code() == grpc.StatusCode.NOT_FOUND  # type: ignore[attr-defined]
        for call, request in (
            (stub.Tokenize, pb.TokenizeRequest()),
            (stub.Detokenize, pb.DetokenizeRequest(tokens=[1] * 1_000_000)),
            (stub.GetTokenizer, pb.GetTokenizerRequest(model="")),
        ):
            with pytest.raises(grpc.RpcError) as caught:
                call(request, metadata=metadata)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT  # type: ignore[attr-defined]
        with pytest.raises(grpc.RpcError) as caught:
            stub.Tokenize(pb.TokenizeRequest(text="a"))
        assert caught.value.code() == grpc.StatusCode.UNAUTHENTICATED  # type: ignore[attr-defined]

"""Neighbouring versions of the contract: sidecar, service and caller in both pairings, and what unknown fields get."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from google.protobuf import descriptor_pool, message_factory
from google.protobuf.descriptor_pb2 import FileDescriptorSet
from grpc_status import rpc_status

from service.settings import Settings
from tests.support.ports import free_ports
from tests.support.stack import MODEL, ROOT, Answer, ServiceThread, Stack, envoy

CONTRACT = "completion/v1/completion.proto"
SERVICE = "completion.v1.CompletionService"
LAST_FIELD = "  optional OnDeadline on_deadline = 48"


def copied(folder: Path) -> Path:
    """A copy of Envoy's files in a folder, from where Envoy can run."""
    for name in ("envoy", "docs"):
        shutil.copytree(ROOT / name, folder / "files" / name)
    return folder / "files"


@contextmanager
def running(model_dir: Path, folder: Path, contract: str | None = None, unknown: str = "refuse") -> Iterator[Stack]:
    """The service behind Envoy, whose files are derived from another `contract` than the service's, if one is given."""
    files = None
    if contract is not None:
        files = copied(folder)
        proto = folder / "proto" / CONTRACT
        proto.parent.mkdir(parents=True)
        proto.write_text(contract)
        script = [sys.executable, ROOT / "envoy" / "descriptor.py"]
        subprocess.run([*script, "--proto", folder / "proto", "--output", files / "envoy"], check=True)
    http_port, grpc_port = free_ports(2)
    settings = Settings(model_dir=model_dir, port=grpc_port, unknown_parameters=unknown)
    sidecar = envoy(http_port, grpc_port, folder, unknown_parameters=unknown, files=files)
    with ServiceThread(settings), sidecar:
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield stack


def error(answer: Answer) -> tuple[int, Any, str]:
    found = answer.json["error"]
    return answer.status, found["param"], found["message"]


def test_a_newer_sidecar_before_an_older_service(model_dir: Path, tmp_path: Path) -> None:
    """It knows a field that was added to the contract, with no change of its filter; the service refuses the number."""
    text = (ROOT / "proto" / CONTRACT).read_text()
    added = "  optional int32 new_number = 900;\n  repeated string new_texts = 901;\n" + LAST_FIELD
    contract = text.replace(LAST_FIELD, added)
    assert contract != text
    with running(model_dir, tmp_path, contract) as stack:
        assert stack.complete(prompt="Hello,", max_tokens=1, stop=["a"]).status == 200
        refused = stack.complete(prompt="Hello,", new_number=5, new_texts=["a"], stream_options=None)
        assert error(refused)[:2] == (400, "900")
        assert "arguments supplied: 900, 901." in refused.json["error"]["message"]
        assert error(stack.complete(prompt="a", new_number="5")) == (
            400,
            "new_number",
            "Invalid type for 'new_number': expected an integer, but got a string instead.",
        )
        assert error(stack.complete(prompt="a", newer=5))[:2] == (400, "newer")


def test_an_older_sidecar_before_a_newer_service(model_dir: Path, tmp_path: Path) -> None:
    """It serves every request of its own contract, and refuses what it does not know."""
    lines = (ROOT / "proto" / CONTRACT).read_text().splitlines(keepends=True)
    contract = "".join(line for line in lines if not line.startswith("  optional float min_p = "))
    with running(model_dir, tmp_path, contract) as stack:
        whole = stack.complete(prompt="Hello,", max_tokens=4, seed=1, top_p=0.5, logprobs=1)
        assert whole.status == 200
        assert stack.complete(prompt="a", max_tokens=2, stream=True).events[-1] == "[DONE]"
        assert error(stack.complete(prompt="a", min_p=0.5))[:2] == (400, "min_p")


@pytest.fixture(scope="module")
def stack_now(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    with running(model_dir, tmp_path_factory.mktemp("now")) as stack:
        yield stack


def released() -> FileDescriptorSet:
    """The contract as it was last released."""
    return FileDescriptorSet.FromString((ROOT / "proto" / "released.binpb").read_bytes())


def messages(files: FileDescriptorSet) -> dict[str, Any]:
    """The message classes of a contract of its own."""
    pool = descriptor_pool.DescriptorPool()
    for file in files.file:
        pool.Add(file)
    return message_factory.GetMessageClassesForFiles([CONTRACT], pool)


@pytest.mark.parametrize("port", ["grpc", "http"])
def test_an_older_caller(stack_now: Stack, port: str) -> None:
    """Who has stubs of the released contract is served, by the service and through Envoy."""
    old = messages(released())
    with grpc.insecure_channel(f"127.0.0.1:{getattr(stack_now, port)}") as channel:
        call = channel.unary_unary(
            f"/{SERVICE}/CreateCompletion",
            request_serializer=lambda request: request.SerializeToString(),
            response_deserializer=old["completion.v1.CreateCompletionResponse"].FromString,
        )
        request = old["completion.v1.CreateCompletionRequest"](model=MODEL, text="Hello,", max_tokens=3, seed=1)
        assert call(request).usage.completion_tokens == 3


@pytest.mark.parametrize("port", ["grpc", "http"])
def test_a_newer_caller(stack_now: Stack, port: str) -> None:
    """It hears of every field number that the service does not have, with its path."""
    files = released()
    (contract,) = (file for file in files.file if file.name == CONTRACT)
    for message in contract.message_type:
        if message.name in {"CreateCompletionRequest", "StreamOptions", "GetModelRequest"}:
            message.field.add(name="new", number=900, type="TYPE_STRING", label="LABEL_OPTIONAL")
    new = messages(files)
    with grpc.insecure_channel(f"127.0.0.1:{getattr(stack_now, port)}") as channel:

        def refused(method: str, request: Any, kind: str) -> pb.Error:
            call = getattr(channel, kind)(f"/{SERVICE}/{method}", lambda message: message.SerializeToString())
            with pytest.raises(grpc.RpcError) as caught:
                list(call(request))
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            detail = pb.ErrorResponse()
            rpc_status.from_call(caught.value).details[0].Unpack(detail)
            return detail.error

        request = new["completion.v1.CreateCompletionRequest"](model=MODEL, text="a", new="b")
        request.stream_options.new = "c"
        for method, kind in (("CreateCompletion", "unary_unary"), ("StreamCompletion", "unary_stream")):
            found = refused(method, request, kind)
            assert (found.param, found.code) == ("900", "unknown_parameter")
            assert "Unrecognized request arguments supplied: 900, stream_options.900." in found.message
        found = refused("GetModel", new["completion.v1.GetModelRequest"](model=MODEL, new="b"), "unary_unary")
        assert found.param == "900"


def test_ignored_parameters_are_named(model_dir: Path, tmp_path: Path) -> None:
    """By setting, an unknown parameter changes nothing but a header: over REST by name, over gRPC by number."""
    fields = {"prompt": "Hello,", "max_tokens": 2, "seed": 1}
    with running(model_dir, tmp_path, unknown="ignore") as stack:
        plain = stack.complete(**fields)
        assert "x-ignored-parameters" not in plain.headers
        ignored = stack.complete(**fields, foo={"a": 1}, maxTokens=9, **{"b\n": 1})
        assert ignored.headers["x-ignored-parameters"] == "foo, maxTokens, b\\x0a"
        assert ignored.json["choices"] == plain.json["choices"]
        streamed = stack.complete(**fields, stream=True, stream_options={"foo": 1})
        assert streamed.headers["x-ignored-parameters"] == "stream_options.foo"
        assert streamed.events[-1] == "[DONE]"
        refused = stack.complete(prompt="a", n=0, foo=1)
        assert (refused.status, refused.headers["x-ignored-parameters"]) == (400, "foo")
        assert error(stack.complete(prompt="a", n="1", foo=1))[:2] == (400, "n")
        # Even so a body has to be JSON.
        assert stack.request("POST", "/v1/completions", '{"foo": 1, "foo": 2}').status == 400
        with grpc.insecure_channel(stack.grpc_address) as channel:
            stub = completion_pb2_grpc.CompletionServiceStub(channel)
            request = pb.CreateCompletionRequest(model=MODEL, text="Hello,", max_tokens=2, seed=1)
            request.MergeFromString(b"\xa2\x38\x01a")  # field 900
            answer, call = stub.CreateCompletion.with_call(request)
            assert dict(call.initial_metadata())["x-ignored-parameters"] == "900"
            assert answer.choices[0].text == plain.json["choices"][0]["text"]


def test_a_body_without_a_field_is_the_same(stack_now: Stack) -> None:
    """Null is unset for every field, also for those of messages."""
    names = [field.name for field in pb.CreateCompletionRequest.DESCRIPTOR.fields]
    typed = {"text", "texts", "tokens", "token_batch", "parts", "json_prompt", "json_stop", "model"}
    nulls = {name: None for name in names if name not in typed}
    body = {"model": MODEL, "prompt": "Hello,", "max_tokens": 2, "seed": 1}
    answers = [
        stack_now.request("POST", "/v1/completions", json.dumps(each)).json
        for each in (body, {**nulls, "prompt": None, "stop": None, **body})
    ]
    assert answers[0]["choices"] == answers[1]["choices"]


def test_a_filter_that_fails_lets_nothing_through(model_dir: Path, tmp_path: Path) -> None:
    """Where the reading of a body fails, the caller gets an error and the service no request."""
    files = copied(tmp_path)
    reader = files / "envoy" / "json.lua"
    text = reader.read_text()
    broken = text.replace("local function document(", "local function document() missing() end\nlocal function unused(")
    assert broken != text
    reader.write_text(broken)
    http_port, grpc_port = free_ports(2)
    with (
        ServiceThread(Settings(model_dir=model_dir, port=grpc_port)) as service,
        envoy(http_port, grpc_port, tmp_path, files=files),
    ):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        before = service.server.models[0].engine.stats
        answer = stack.complete(prompt="a", max_tokens=1)
        assert error(answer) == (500, None, "The server had an error while processing the request.")
        assert service.server.models[0].engine.stats == before

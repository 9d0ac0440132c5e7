"""The examples, built from nothing but the stubs, print the same as REST answers."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest

from tests.clients.documented import DOCUMENT
from tests.support.stack import KEY, MODEL, ROOT, Stack

pytestmark = pytest.mark.clients

EXAMPLES = ROOT / "examples"
BUILD = ROOT / "build" / "examples"
# What builds each example, besides the generators that proto/clients.py looks for itself.
COMPILERS = {
    "python": (),
    "typescript": ("node", "npm"),
    "go": ("go",),
    "cpp": ("cmake", "g++"),
    "java": ("javac", "java"),
    "csharp": ("dotnet",),
}


def run(*command: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command in the repository's root; without PYTHONPATH, since the service's own stubs could be on it."""
    inherited = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(
        list(map(str, command)),
        cwd=ROOT,
        env={**inherited, **environment},
        capture_output=True,
        encoding="utf-8",
        check=False,
    )


@functools.cache
def build(language: str) -> None:
    """Generates the stubs and builds the example; skips where this machine lacks a tool for it."""
    if missing := [tool for tool in COMPILERS[language] if shutil.which(tool) is None]:
        pytest.skip(f"{language}: {', '.join(missing)} not found")
    done = run("make", "-s", "-C", EXAMPLES, language)
    if done.returncode != 0 and " is missing: " in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stdout + done.stderr


def expected(stack: Stack) -> str:
    """The output that an example should have, computed from REST's answer."""
    story = {"prompt": "Once upon a time", "max_tokens": 24, "temperature": 0.8, "seed": 7}
    text = stack.complete(**story).json["choices"][0]["text"]
    assert len(text) > 20
    scored = stack.complete(prompt="The capital of France is", max_tokens=4, temperature=0, logprobs=1)
    logprobs = scored.json["choices"][0]["logprobs"]
    assert logprobs["tokens"][0] == " Paris"
    error = stack.complete(max_tokens=-1).json["error"]
    assert error["code"] == "integer_below_min_value"
    scores = zip(logprobs["tokens"], logprobs["token_logprobs"], strict=True)
    lines = [
        f"unary:{text}",
        f"stream:{text}",
        *(f"logprob:{token} {score:.3f}" for token, score in scores),
        f"error: {error['param']} {error['code']} {error['message']}",
        "deadline exceeded",
        "cancelled after 3 pieces",
    ]
    return "".join(f"{line}\n" for line in lines)


@pytest.mark.parametrize("door", ["grpc_address", "envoy_address"])
@pytest.mark.parametrize("language", COMPILERS)
def test_every_language_says_what_rest_says(stack: Stack, language: str, door: str) -> None:
    """Text, stream, scores, typed error, deadline and cancellation are the same in every language, by both doors."""
    assert f"| `make -C examples {language} run-{language}` |" in DOCUMENT
    build(language)
    address = {"COMPLETION_ADDRESS": getattr(stack, door), "API_KEY": KEY}
    done = run("make", "-s", "-C", EXAMPLES, f"run-{language}", **address)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(stack)


def test_csharp_stubs_have_the_client() -> None:
    """The C# stubs hold the client of the service, each method of the callers' view, and no server."""
    done = run(sys.executable, "proto/clients.py", "csharp")
    if " is missing: " in done.stderr:
        pytest.skip(done.stderr)
    assert done.returncode == 0, done.stderr
    code = (EXAMPLES / "csharp" / "stubs" / "CompletionGrpc.cs").read_text()
    assert "class CompletionServiceClient : grpc::ClientBase<CompletionServiceClient>" in code
    for method in ("CreateCompletionAsync(", "StreamCompletion(", "ListModelsAsync(", "GetModelAsync("):
        assert method in code
    assert "CompletionServiceBase" not in code
    assert "StreamCompletionEvents" not in code


def test_one_command_makes_all_stubs() -> None:
    """The documented command runs the generator for all languages, or for those named."""
    assert "\n    make client-stubs\n" in DOCUMENT
    for languages in ("", "go java"):
        output = run("make", "-n", "client-stubs", f"LANGUAGES={languages}").stdout.splitlines()
        assert f".venv/bin/python proto/clients.py {languages}" in output


def test_a_missing_generator_is_named() -> None:
    """Where a generator is missing, the others' stubs are made, and the command fails and says which and why."""
    done = run(sys.executable, "proto/clients.py", "python", "go", PATH="/nowhere")
    assert done.returncode != 0
    assert done.stdout == "python: examples/python/stubs\n"
    assert "go: protoc 3.21.12 is missing: install it with examples/install-toolchains.sh" in done.stderr
    unknown = run(sys.executable, "proto/clients.py", "cobol")
    assert "no such language: cobol; there are python, typescript, go, java, cpp, csharp" in unknown.stderr


def test_the_wheel_needs_protobuf_and_grpcio_alone(stack: Stack, tmp_path: Path) -> None:
    """The stubs' wheel installs with protobuf, grpcio and what grpcio itself needs, and completes with them."""
    build("python")
    (wheel,) = (BUILD / "wheel").glob("*.whl")
    venv.create(tmp_path, with_pip=True)
    python = tmp_path / "bin" / "python"
    installed = run(python, "-m", "pip", "install", "--quiet", wheel)
    assert installed.returncode == 0, installed.stderr
    names = run(python, "-m", "pip", "list", "--format", "freeze").stdout.split()
    packages = {name.partition("==")[0] for name in names}
    assert packages - {"pip", "setuptools"} == {"completion-stubs", "grpcio", "protobuf", "typing_extensions"}
    program = f"""
import grpc
from completion.v1 import completion_pb2 as pb, completion_pb2_grpc
stub = completion_pb2_grpc.CompletionServiceStub(grpc.insecure_channel("{stack.grpc_address}"))
request = pb.CreateCompletionRequest(model="{MODEL}", text="The capital of France is", max_tokens=3, temperature=0)
print(stub.CreateCompletion(request, metadata=[("authorization", "Bearer {KEY}")]).choices[0].text, end="")
"""
    done = run(python, "-c", program)
    rest = stack.complete(prompt="The capital of France is", max_tokens=3, temperature=0)
    assert done.stdout == rest.json["choices"][0]["text"], done.stderr

"""Clients written for OpenAI, unmodified: the snippets of docs/clients.md say what REST says."""

from __future__ import annotations

import json
import queue
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.clients.documented import CLIENTS, Workplace
from tests.support.browser import CHROMIUM
from tests.support.folders import Files, served
from tests.support.patience import PATIENCE
from tests.support.stack import ROOT, Stack

pytestmark = pytest.mark.clients

TYPESCRIPT = ROOT / "examples" / "typescript"


@pytest.fixture
def here(stack: Stack, tmp_path: Path) -> Workplace:
    return Workplace(stack, tmp_path)


@pytest.fixture(scope="session")
def greedy(stack: Stack) -> dict:
    """The first choice of REST's answer to the documented request."""
    fields = {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0, "logprobs": 1}
    choice = stack.complete(**fields).json["choices"][0]
    assert choice["text"].startswith(" Paris")
    return choice


def check(output: str, greedy: dict) -> None:
    """A program has printed the text, the text again from a stream, and its log probabilities."""
    text, scores = greedy["text"], greedy["logprobs"]["token_logprobs"]
    begin = f"{text}\n{text}\n"
    assert output.startswith(begin)
    assert json.loads(output.removeprefix(begin)) == scores


@pytest.mark.parametrize("title", ["OpenAI, for Python", "LangChain", "LlamaIndex", "LiteLLM"])
def test_python_clients(here: Workplace, greedy: dict, title: str) -> None:
    """Whole answers, streams and scores through a Python client are REST's."""
    here.needs("litellm")
    program = here.write("program.py", title, "python")
    check(here.run(CLIENTS / "python", program), greedy)


def test_openai_for_python_in_our_own_version(here: Workplace, greedy: dict) -> None:
    """The same program runs with the version of the client that the other tests use."""
    check(here.run(sys.executable, here.write("program.py", "OpenAI, for Python", "python")), greedy)


def test_openai_for_node(here: Workplace, greedy: dict) -> None:
    """Whole answers, streams and scores through the Node client are REST's."""
    here.needs("openai")
    check(here.run("node", here.write("program.mjs", "OpenAI, for Node", "js")), greedy)


def test_llm_command_line(here: Workplace, greedy: dict) -> None:
    """`llm` streams and completes the greedy text, and logs its scores."""
    here.needs("llm")
    here.write("extra-openai-models.yaml", "`llm`, the command line", "yaml")
    assert here.bash("`llm`, the command line") == f"{greedy['text']}\n" * 2
    (entry,) = json.loads(here.run("llm", "logs", "list", "-n", "1", "--json"))
    logged = entry["response_json"]
    assert logged["choices"][0]["logprobs"]["token_logprobs"] == greedy["logprobs"]["token_logprobs"]


def test_promptfoo(here: Workplace, greedy: dict) -> None:
    """The assertions of promptfoo pass, on the greedy text, with the usage counted."""
    here.needs("promptfoo")
    here.write("promptfooconfig.yaml", "promptfoo", "yaml")
    here.bash("promptfoo")
    results = json.loads((here.folder / "result.json").read_text())["results"]
    assert (results["stats"]["successes"], results["stats"]["failures"], results["stats"]["errors"]) == (2, 0, 0)
    (first,) = [one for one in results["results"] if one["prompt"]["raw"] == "The capital of France is"]
    assert first["response"]["output"] == greedy["text"]
    assert first["response"]["tokenUsage"]["completion"] == 16


def test_buf_curl(here: Workplace, greedy: dict) -> None:
    """With only the contract, buf curl streams the greedy text through Envoy."""
    check_pieces(here.bash("`buf curl`"), greedy)


def test_grpcurl(here: Workplace, greedy: dict) -> None:
    """With only the contract and one import path, grpcurl streams the greedy text through Envoy."""
    here.needs("grpcurl")
    check_pieces(here.bash("`grpcurl`"), greedy)


def check_pieces(output: str, greedy: dict) -> None:
    """A command has printed the messages of a stream as JSON, one after the other."""
    pieces, decoder = [], json.JSONDecoder()
    while output.strip():
        piece, end = decoder.raw_decode(output.lstrip())
        pieces.append(piece["choices"][0])
        output = output.lstrip()[end:]
    assert "".join(piece.get("text", "") for piece in pieces) == greedy["text"]
    assert [piece.get("finishReason") for piece in pieces][-1] == "FINISH_REASON_LENGTH"
    assert len(pieces) > 3


def test_grpc_js(here: Workplace, greedy: dict) -> None:
    """With only the contract and one import path, grpc-js prints the greedy text, whole and streamed."""
    here.needs("proto-loader-gen-types")
    output = here.run("node", here.write("program.mjs", "grpc-js, with proto-loader", "js"))
    assert output == f"{greedy['text']}\n{greedy['text']}\n"


class Page(Files):
    """Serves a folder, and takes what the page there reports when it is done."""

    reports: queue.Queue[str] = queue.Queue()

    def do_POST(self) -> None:  # noqa: N802, the library's name
        body = self.rfile.read(int(self.headers["content-length"])).decode()
        self.send_response(204)
        self.end_headers()
        self.reports.put(body)


def bundled(here: Workplace) -> Path:
    """The documented web page's program, checked by the TypeScript compiler, as one script and a page around it."""
    if shutil.which("npm") is None:
        pytest.skip("npm not found")
    if not (TYPESCRIPT / "node_modules").exists():
        subprocess.run(["npm", "ci", "--silent"], cwd=TYPESCRIPT, check=True)
    subprocess.run([sys.executable, "proto/clients.py", "typescript"], cwd=ROOT, check=True, capture_output=True)
    source = TYPESCRIPT / "build" / "page.ts"
    source.parent.mkdir(exist_ok=True)
    source.write_text(here.snippet("A web page, by gRPC-Web", "ts"))
    tsc = ["tsc", "--noEmit", "--strict", "--skipLibCheck", "--target", "es2022", "--module", "nodenext"]
    for command in (
        [*tsc, "--lib", "es2022,dom,dom.asynciterable", str(source)],
        ["esbuild", str(source), "--bundle", "--format=esm", "--target=es2022", f"--outfile={here.folder / 'page.js'}"],
    ):
        done = subprocess.run(["npx", *command], cwd=TYPESCRIPT, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    page = here.folder / "page.html"
    page.write_text(
        '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,">'
        '<pre id="answer"></pre><pre id="stream"></pre><pre id="error"></pre>'
        '<script type="module">await import("./page.js").catch((error) => document.body.append(`failed: ${error}`));'
        'await fetch("/", {method: "POST", body: document.body.innerHTML});</script>'
    )
    return page


def test_grpc_web_in_a_browser(here: Workplace, greedy: dict) -> None:
    """A page of another origin completes and streams the greedy text by gRPC-Web, and reads a typed error."""
    browser = shutil.which("chromium")
    if browser is None:
        pytest.skip("chromium not found")
    bundled(here)
    with served(here.folder, Page) as address:
        profile = f"--user-data-dir={here.folder / 'profile'}"
        command = [browser, *CHROMIUM, profile, f"{address}/page.html"]
        window = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            page = Page.reports.get(timeout=PATIENCE)
        finally:
            window.terminate()
            window.wait(PATIENCE)
    assert f'<pre id="answer">{greedy["text"]}</pre>' in page
    assert f'<pre id="stream">{greedy["text"]}</pre>' in page
    assert "<pre id=\"error\">Invalid 'max_tokens': integer below minimum value." in page

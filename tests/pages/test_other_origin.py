"""OpenAI's JavaScript client, as it is published, in a real Chromium on a page of another origin."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.pages.expected import GREEDY, Guarded, greedy
from tests.support.folders import served
from tests.support.stack import KEY, MODEL, ROOT, Stack

if TYPE_CHECKING:
    from tests.pages.chromium import Page

pytestmark = pytest.mark.browser

CLIENTS = ROOT / "tests" / "clients"
VERSION = json.loads((CLIENTS / "package.json").read_text())["dependencies"]["openai"]
PAGE = '<!doctype html><meta charset="utf-8"><link rel="icon" href="data:,"><p>a page of another origin</p>'
# The page's program: a client, and what is to be done with it, a function of the client.
PROGRAM = """
const [url, key, source, done] = arguments;
(async () => {
  const { default: OpenAI } = await import("/openai/index.mjs");
  const client = new OpenAI({ baseURL: url, apiKey: key, maxRetries: 0, dangerouslyAllowBrowser: true });
  const told = (error) => ({ name: error.constructor.name, status: error.status ?? null, message: error.message,
    code: error.code ?? null, id: error.requestID ?? null });
  return await eval(source)(client).catch((error) => ({ error: told(error) }));
})().then(done, (error) => done({ failed: String(error) }));
"""


@pytest.fixture(scope="session")
def package(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The published package: where `make test-clients` has installed it, else from the registry."""
    installed = CLIENTS / "node_modules" / "openai"
    if installed.exists():
        return installed
    if shutil.which("npm") is None:
        pytest.skip("npm not found")
    folder = tmp_path_factory.mktemp("openai")
    subprocess.run(["npm", "pack", "--silent", f"openai@{VERSION}"], cwd=folder, check=True, capture_output=True)
    (archive,) = folder.glob("*.tgz")
    shutil.unpack_archive(archive, folder, filter="data")
    return folder / "package"


@pytest.fixture(scope="module")
def elsewhere(package: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("elsewhere")
    (folder / "index.html").write_text(PAGE)
    (folder / "openai").symlink_to(package)
    with served(folder) as origin:
        yield origin


class Client:
    """The JavaScript client on the other page."""

    def __init__(self, tab: Page, stack: Stack) -> None:
        self._driver = tab.driver
        self._url = stack.base_url

    def does(self, source: str, key: str = KEY) -> Any:
        """What a function of the client gives, or the error that it throws."""
        return self._driver.execute_async_script(PROGRAM, self._url, key, source)


@pytest.fixture
def client(tab: Page, elsewhere: str, guarded: Guarded) -> Iterator[Client]:
    tab.driver.get(elsewhere)
    tab.driver.set_script_timeout(60)
    yield Client(tab, guarded.stack)
    tab.drain()


def request(**fields: Any) -> str:
    return json.dumps({"model": MODEL, "prompt": GREEDY["prompt"], "max_tokens": 24, "temperature": 0, **fields})


def test_whole(client: Client, guarded: Guarded) -> None:
    """A whole answer, and its id and time, which only exposed headers tell."""
    call = f"client.completions.create({request()}).withResponse()"
    read = (
        "[data.choices[0].text, ...['x-request-id', 'openai-processing-ms'].map((name) => response.headers.get(name))]"
    )
    text, request_id, milliseconds = client.does(f"async (client) => {call}.then(({{ data, response }}) => {read})")
    assert text == greedy(guarded.stack)["text"]
    assert request_id
    assert int(milliseconds) > 0


def test_streamed(client: Client, guarded: Guarded) -> None:
    """The same text, piece by piece."""
    stream = f"await client.completions.create({request(stream=True)})"
    loop = f"for await (const piece of {stream}) pieces.push(piece.choices[0].text);"
    pieces = client.does(f"async (client) => {{ const pieces = []; {loop} return pieces; }}")
    assert len(pieces) > 3
    assert "".join(pieces) == greedy(guarded.stack)["text"]


def test_models(client: Client) -> None:
    """The list of models."""
    assert MODEL in client.does("async (client) => (await client.models.list()).data.map((model) => model.id)")


@pytest.mark.parametrize(
    ("call", "key", "status", "says"),
    [
        (f"client.completions.create({request(n=0)})", KEY, 400, "Expected a value >= 1, but got 0 instead."),
        (f"client.completions.create({request()})", "wrong", 401, "Incorrect API key provided."),
        ("client.chat.completions.create({ model: 'a', messages: [] })", KEY, 404, "(POST /v1/chat/completions)"),
        ("client.models.delete('a')", KEY, 405, "Models are requested with GET."),
        ("client.completions.create({ model: 'a', prompt: 'a'.repeat(2200000) })", KEY, 413, "up to 2 MiB"),
        ("client.get('/models', { query: { a: 1 } })", KEY, 400, "Query parameters are not accepted."),
    ],
)
def test_errors_can_be_read(client: Client, call: str, key: str, status: int, says: str) -> None:
    """The client throws its error for the status, with the message, whether the service or Envoy refuses."""
    error = client.does(f"async (client) => {call}", key)["error"]
    assert error["status"] == status
    assert says in error["message"]
    assert error["id"]


def test_the_callers_own_headers_pass(client: Client) -> None:
    """Whatever else a program adds may be sent as well."""
    headers = {
        "x-client-request-id": "mine",
        "idempotency-key": "1",
        "x-session-id": "s",
        "traceparent": "00-1",
        "x-own": "2",
    }
    call = f"client.completions.create({request()}, {{ headers: {json.dumps(headers)} }}).asResponse()"
    found = client.does(f"async (client) => (await {call}).headers.get('x-client-request-id')")
    assert found == "mine"

"""`python -m bench bodies`: what the strict reading of request bodies costs in Envoy, by form and size of the body.

Each body is read by envoy/json.lua as often as fits a second, inside a real Envoy that does nothing else, and the
processor time of one reading is printed. The last column is the share of a real request's time with the body of 1 KB
and one token to generate, through the service.
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.client import API_KEY
from bench.peers import services_behind_envoy
from bench.processes import wait_for_answer
from deploy import local
from deploy.envoy_config import free_ports

ROOT = Path(__file__).resolve().parent.parent
LARGEST = 2 << 20
REQUESTS = 50

# Answers with the median of the readings' processor time, in microseconds.
TIMED = """
local json = dofile("envoy/json.lua")
local contract = dofile("envoy/requests.lua")
function envoy_on_request(handle)
  local body = handle:body()
  if not body then
    return
  end
  local text = body:getBytes(0, body:length())
  local times, began = {}, os.clock()
  repeat
    local start = os.clock()
    local found = json.read(text, contract.messages, "CreateCompletionRequest")
    table.insert(times, os.clock() - start)
    assert(not found.fault and #found.unknown == 0, found.fault and found.fault.message)
  until os.clock() - began > 1
  table.sort(times)
  handle:respond({ [":status"] = "200" }, string.format("%.3f", times[math.ceil(#times / 2)] * 1e6))
end
"""


@contextmanager
def lua_envoy(script: str) -> Iterator[str]:
    """The URL of a real Envoy that only runs a Lua script, from the project's folder."""
    (port,) = free_ports(1)
    with tempfile.TemporaryDirectory() as folder:
        config = Path(folder) / "envoy.json"
        config.write_text(json.dumps(_config(port, script)))
        command = [local.envoy_binary(), "-c", str(config), "--concurrency", "1", "--disable-hot-restart", "-l", "warn"]
        child = local.Child("Envoy", command, Path(folder) / "envoy.log")
        try:
            wait_for_answer(child, port, "/")
            yield f"http://127.0.0.1:{port}"
        finally:
            child.stop()


def _config(port: int, script: str) -> object:
    filters = "type.googleapis.com/envoy.extensions.filters"
    http = f"{filters}.http"
    manager = {
        "@type": f"{filters}.network.http_connection_manager.v3.HttpConnectionManager",
        "stat_prefix": "bodies",
        "route_config": {
            "virtual_hosts": [
                {
                    "name": "bodies",
                    "domains": ["*"],
                    "routes": [{"match": {"prefix": "/"}, "direct_response": {"status": 200}}],
                }
            ]
        },
        "http_filters": [
            {
                "name": "buffer",
                "typed_config": {"@type": f"{http}.buffer.v3.Buffer", "max_request_bytes": 2 * LARGEST},
            },
            {
                "name": "lua",
                "typed_config": {"@type": f"{http}.lua.v3.Lua", "default_source_code": {"inline_string": script}},
            },
            {"name": "router", "typed_config": {"@type": f"{http}.router.v3.Router"}},
        ],
    }
    listener = {
        "name": "bodies",
        "address": {"socket_address": {"address": "127.0.0.1", "port_value": port}},
        "filter_chains": [{"filters": [{"name": "http", "typed_config": manager}]}],
    }
    return {"static_resources": {"listeners": [listener]}}


def ask(url: str, body: bytes) -> bytes:
    """What Envoy answers to a body."""
    request = urllib.request.Request(url, data=body)  # noqa: S310 - our own
    request.add_header("Content-Type", "application/json")
    request.add_header("Authorization", f"Bearer {API_KEY}")
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(request, timeout=600) as answer:
        content: bytes = answer.read()
    return content


def filled(prompt: str, size: int) -> bytes:
    """A body of about `size` bytes, whose prompt is JSON that `%s` repeats, one piece after the other."""
    before, piece, after = prompt.split("|")
    body = f'{{"model": "m", "max_tokens": 1, "temperature": 0.5, "stop": ["\\n"], "prompt": {before}'
    repeats = (size - len(body.encode()) - len(after) - 8) // len(piece.encode())
    return f"{body}{piece * repeats}{after}}}".encode()


FORMS = {
    "text": '"|the quick brown fox jumps |"',
    "text, not ASCII": '"|日本語のテキスト |"',
    "text with escapes": '"|line one\\nline \\"two\\"\\n|"',
    "token ids": "[|12345, 678, |9]",
    "texts": '[|"a short text", |"b"]',
    "arrays of token ids": "[|[101, 2023, 2003], |[1]]",
}


def run(model_dir: Path) -> None:
    """Prints the table."""
    small = filled(FORMS["text"], 1 << 10).replace(b'"m"', f'"{local.MODEL}"'.encode())
    with services_behind_envoy(["--model-dir", str(model_dir)]) as (port, _, _):
        times = []
        for _ in range(REQUESTS):
            began = time.perf_counter()
            ask(f"http://127.0.0.1:{port}/v1/completions", small)
            times.append(time.perf_counter() - began)
    request = statistics.median(times) * 1e6
    with lua_envoy(TIMED) as url:
        print(f"{'prompt':<22}{'1 KB, us':>12}{'of a request':>14}{'2 MiB, ms':>12}")
        for name, form in FORMS.items():
            reading = float(ask(url, filled(form, 1 << 10)))
            large = float(ask(url, filled(form, LARGEST)))
            print(f"{name:<22}{reading:>12.1f}{reading / request:>13.2%}{large / 1000:>12.1f}")
    print(f"A request with a text of 1 KB and one token to generate took {request / 1000:.1f} ms.")

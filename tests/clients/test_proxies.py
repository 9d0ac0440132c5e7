"""Proxies that people put in front: Debian's nginx and HAProxy, and ab, with no more configuration than they need."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import socket
import ssl
import subprocess
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import trustme
from grpc_health.v1 import health_pb2

from tests.support.patience import PATIENCE, eventually
from tests.support.stack import AUTHORIZED, Stack, envoy, free_ports
from tests.support.stub import Stub, serving

pytestmark = pytest.mark.clients

PIECES = 12
BODY = '{"model": "m", "prompt": "a", "stream": true}'
NGINX = """
daemon off; master_process off; pid {folder}/nginx.pid; error_log stderr; worker_processes 1; {user}
events {{}}
http {{
  access_log off;
  client_body_temp_path {folder}/body; proxy_temp_path {folder}/proxy; fastcgi_temp_path {folder}/fastcgi;
  uwsgi_temp_path {folder}/uwsgi; scgi_temp_path {folder}/scgi;
  server {{
    listen 127.0.0.1:{port} {listen};
    {options}
    location / {{ proxy_pass http://127.0.0.1:{upstream}; }}
  }}
}}
"""
HAPROXY = """
global
  stats socket {folder}/haproxy.sock
defaults
  mode http
  timeout connect 5s
  timeout client 60s
  timeout server 60s
frontend front
  bind 127.0.0.1:{port}
  default_backend back
backend back
  option httpchk GET /health
  server one 127.0.0.1:{upstream} check inter 200ms
"""
TLS = "ssl_certificate {folder}/server.pem; ssl_certificate_key {folder}/server.pem;"
WAYS = {
    "as it comes": ("", ""),
    "gzip": ("", "gzip on; gzip_types text/event-stream; gzip_min_length 1;"),
    "gzip, HTTP/1.1": ("", "gzip on; proxy_http_version 1.1;"),
    "TLS": ("ssl", TLS),
    "TLS, HTTP/1.1": ("ssl", f"{TLS} proxy_http_version 1.1;"),
    "TLS, gzip": ("ssl", f"{TLS} gzip on; gzip_types text/event-stream; proxy_http_version 1.1;"),
}


@dataclass(frozen=True)
class Behind:
    """A stub behind Envoy, and a folder with a certificate."""

    stack: Stack
    stub: Stub
    folder: Path


@pytest.fixture(scope="module")
def behind(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Behind]:
    folder, stub = tmp_path_factory.mktemp("proxies"), Stub()
    (http_port,) = free_ports(1)
    authority = trustme.CA()
    authority.issue_cert("127.0.0.1").private_key_and_cert_chain_pem.write_to_path(str(folder / "server.pem"))
    authority.cert_pem.write_to_path(str(folder / "ca.pem"))
    with serving(stub) as grpc_port, envoy(http_port, grpc_port, folder):
        stack = Stack(http_port, grpc_port)
        stack.wait_until_ready()
        yield Behind(stack, stub, folder)


def program(name: str) -> str:
    found = shutil.which(name) or shutil.which(name, path="/usr/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed: run `make test-clients`")
    return found


@contextmanager
def running(*command: str | Path, port: int) -> Iterator[None]:
    """A process of the test's own that listens on the port."""
    process = subprocess.Popen(list(map(str, command)))

    def listening() -> bool:
        assert process.poll() is None, f"{command[0]} ended with {process.returncode}"
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    try:
        eventually(listening)
        yield
    finally:
        process.terminate()
        process.wait(PATIENCE)


@contextmanager
def nginx(behind: Behind, way: str) -> Iterator[int]:
    listen, options = WAYS[way]
    (port,) = free_ports(1)
    options = options.replace("{folder}", str(behind.folder))
    user = "user root;" if os.geteuid() == 0 else ""
    text = NGINX.format(
        folder=behind.folder, port=port, listen=listen, options=options, upstream=behind.stack.http, user=user
    )
    config = behind.folder / "nginx.conf"
    config.write_text(text)
    with running(program("nginx"), "-p", behind.folder, "-c", config, port=port):
        yield port


@contextmanager
def haproxy(behind: Behind) -> Iterator[int]:
    (port,) = free_ports(1)
    config = behind.folder / "haproxy.cfg"
    config.write_text(HAPROXY.format(folder=behind.folder, port=port, upstream=behind.stack.http))
    with running(program("haproxy"), "-q", "-db", "-f", config, port=port):
        yield port


def connection(behind: Behind, port: int, tls: bool = False) -> http.client.HTTPConnection:
    if not tls:
        return http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    trusted = ssl.create_default_context(cafile=behind.folder / "ca.pem")
    return http.client.HTTPSConnection("127.0.0.1", port, timeout=PATIENCE, context=trusted)


def check_one_by_one(behind: Behind, port: int, tls: bool = False) -> None:
    """Reads a stream whose next piece is sent only once the one before it has been read."""
    stub = behind.stub
    stub.pieces = PIECES
    asked = connection(behind, port, tls)
    try:
        headers = {**AUTHORIZED, "content-type": "application/json", "accept-encoding": "gzip"}
        stub.turns.release()
        asked.request("POST", "/v1/completions", BODY, headers)
        answer = asked.getresponse()
        assert answer.status == 200
        plain = zlib.decompressobj(31) if answer.headers.get("content-encoding") == "gzip" else None
        text = b""
        for number in range(PIECES):
            while b"data: %d\n\n" % number not in text:
                read = answer.read1(65536)
                assert read, text
                text += plain.decompress(read) if plain else read
            stub.turns.release()
    finally:
        asked.close()
        while stub.turns.acquire(blocking=False):
            pass


@pytest.mark.parametrize("way", WAYS)
def test_nginx(behind: Behind, way: str) -> None:
    """Whole answers and refusals pass, and tokens come one by one, whatever nginx speaks on either side."""
    tls = WAYS[way][0] == "ssl"
    with nginx(behind, way) as port:
        check_one_by_one(behind, port, tls)
        for path, body, status in (
            ("/v1/completions", "{}", 200),
            ("/v1/nothing", "{}", 404),
            ("/v1/models", None, 200),
        ):
            asked = connection(behind, port, tls)
            asked.request("POST" if body else "GET", path, body, {"content-type": "application/json"})
            answer = asked.getresponse()
            assert answer.status == status
            assert answer.read().startswith(b"{")
            asked.close()


def test_haproxy(behind: Behind) -> None:
    """Its checks are green as long as the service is healthy, and red when it is not; tokens come one by one."""
    with haproxy(behind) as port:
        eventually(lambda: state(behind) == ("UP", "L7OK", "200"))
        check_one_by_one(behind, port)
        behind.stub.health.set("", health_pb2.HealthCheckResponse.NOT_SERVING)
        eventually(lambda: state(behind) == ("DOWN", "L7STS", "503"))
        behind.stub.health.set("", health_pb2.HealthCheckResponse.SERVING)
        eventually(lambda: state(behind) == ("UP", "L7OK", "200"))


def state(behind: Behind) -> tuple[str, str, str]:
    """HAProxy's view of the server: whether it is up, the result of the last check, and its status code."""
    with socket.socket(socket.AF_UNIX) as control:
        control.connect(str(behind.folder / "haproxy.sock"))
        control.sendall(b"show stat\n")
        text = b""
        while part := control.recv(65536):
            text += part
    names, *rows = [line.split(",") for line in text.decode().removeprefix("# ").splitlines() if line]
    (row,) = [dict(zip(names, row, strict=False)) for row in rows if row[:2] == ["back", "one"]]
    return row["status"].split()[0], row["check_status"].removeprefix("* "), row["check_code"]


@pytest.mark.parametrize("options", [[], ["-k"]])
def test_ab(behind: Behind, options: list[str]) -> None:
    """The Apache benchmark gets an answer to each of its requests, by one connection each and by one for many."""
    body = behind.folder / "body.json"
    body.write_text('{"model": "m", "prompt": "a"}')
    address = f"http://{behind.stack.envoy_address}/v1/completions"
    command = [program("ab"), "-q", *options, "-n", "40", "-c", "4", "-p", str(body), "-T", "application/json", address]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert re.search(r"Complete requests: +40\n", output)
    assert re.search(r"Failed requests: +0\n", output)
    assert "Non-2xx" not in output
    assert bool(options) == ("Keep-Alive requests:    40" in output)

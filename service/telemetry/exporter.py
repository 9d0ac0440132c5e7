"""Serves metrics on a port of their own, where nobody needs a key."""

from __future__ import annotations

import socket
from collections import OrderedDict
from collections.abc import Iterable
from contextlib import suppress
from socketserver import ThreadingMixIn
from threading import Lock, Thread
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer
from wsgiref.types import StartResponse, WSGIApplication, WSGIEnvironment

from prometheus_client import CollectorRegistry, make_wsgi_app

# Connections that are answered at once.
MOST_CONNECTIONS = 16

_OPEN_METRICS = "application/openmetrics-text"


class Exporter:
    """Serves metrics over HTTP from threads of its own, until it is closed. `address` is host:port."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Raises OSError when the port cannot be had."""
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._server = _server_of(family)((host, port), Handler)
        self._server.set_app(_with_whole_names(make_wsgi_app(registry)))
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Ends the serving; whoever is being answered is not waited for."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(WSGIRequestHandler):
    """Answers one request, and waits for it only so long."""

    timeout = 5.0

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, the library's name
        """Nothing: who scrapes does so all day."""


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each connection on a thread, a few at a time: one more, and the oldest has to go.

    So whoever opens connections and is silent keeps nobody who asks from being answered.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[Handler]) -> None:
        self._open: OrderedDict[socket.socket, None] = OrderedDict()
        self._lock = Lock()
        super().__init__(address, handler)

    def process_request(self, request: socket.socket, client_address: Any) -> None:  # type: ignore[override]
        with self._lock:
            self._open[request] = None
            oldest = next(iter(self._open)) if len(self._open) > MOST_CONNECTIONS else None
            if oldest is not None:
                del self._open[oldest]
        if oldest is not None:
            with suppress(OSError):
                oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Nothing: who leaves, or is silent, is no error."""


def _server_of(family: socket.AddressFamily) -> type[_Server]:
    return type("_ServerOfFamily", (_Server,), {"address_family": family})


def _with_whole_names(app: WSGIApplication) -> WSGIApplication:
    """Keeps the colons of names: in OpenMetrics the library writes `_` for them unless it is asked not to."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        asked = environ.get("HTTP_ACCEPT", "")
        environ["HTTP_ACCEPT"] = f"{_OPEN_METRICS};version=1.0.0;escaping=allow-utf-8" if _OPEN_METRICS in asked else ""
        return app(environ, start)

    return answer

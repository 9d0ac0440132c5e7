"""Serves metrics over HTTP on a separate port, without keys."""

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

# The most connections that are open at once.
MOST_CONNECTIONS = 16

_OPEN_METRICS = "application/openmetrics-text"


class Exporter:
    """Serves metrics from its own threads until it is closed. `address` is host:port."""

    def __init__(self, registry: CollectorRegistry, host: str, port: int) -> None:
        """Raises OSError when it cannot listen on the port."""
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self._server = _Server((host, port), Handler)
        self._server.set_app(_keeping_colons(make_wsgi_app(registry)))
        self._thread = Thread(target=self._server.serve_forever, name="metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving without waiting for open connections."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


class Handler(WSGIRequestHandler):
    """Answers one request; `timeout` limits in seconds how long it waits for the request."""

    timeout = 5.0

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002, the library's name
        """Logs nothing, because scrapes are frequent."""


class _Server(ThreadingMixIn, WSGIServer):
    """Answers each connection on a thread. A new connection beyond the limit closes the oldest.

    So clients that open connections and send nothing cannot block others.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], handler: type[Handler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        self._open: OrderedDict[socket.socket, None] = OrderedDict()
        self._lock = Lock()
        super().__init__(address, handler)

    def process_request(self, request: socket.socket, client_address: Any) -> None:  # type: ignore[override]
        with self._lock:
            self._open[request] = None
            if len(self._open) > MOST_CONNECTIONS:
                oldest, _ = self._open.popitem(last=False)
                with suppress(OSError):
                    oldest.shutdown(socket.SHUT_RDWR)
        super().process_request(request, client_address)

    def shutdown_request(self, request: socket.socket) -> None:  # type: ignore[override]
        with self._lock:
            self._open.pop(request, None)
        super().shutdown_request(request)

    def handle_error(self, request: object, client_address: object) -> None:
        """Logs nothing, because a client that leaves or sends nothing is no error."""


def _keeping_colons(app: WSGIApplication) -> WSGIApplication:
    """Keeps the colons in names. For OpenMetrics the library replaces them by `_` unless the request forbids that."""

    def answer(environ: WSGIEnvironment, start: StartResponse) -> Iterable[bytes]:
        accept = environ.get("HTTP_ACCEPT", "")
        environ["HTTP_ACCEPT"] = (
            f"{_OPEN_METRICS};version=1.0.0;escaping=allow-utf-8" if _OPEN_METRICS in accept else ""
        )
        return app(environ, start)

    return answer

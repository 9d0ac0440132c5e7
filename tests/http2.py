"""HTTP/2 as somebody speaks it who wants no good: frames by hand, on sockets that nobody else reads."""

from __future__ import annotations

import socket
import struct
from collections.abc import Mapping

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS = 0, 1, 3, 4
END_STREAM, END_HEADERS = 1, 4
INITIAL_WINDOW = 4
_LARGEST_FRAME = 16384


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    """An HTTP/2 frame."""
    return struct.pack(">I", len(payload))[1:] + bytes([kind, flags]) + struct.pack(">I", stream) + payload


def literal(name: str, value: str) -> bytes:
    """A header as HPACK writes one that is in no table."""
    return b"\x00" + _string(name) + _string(value)


def _string(text: str) -> bytes:
    data = text.encode()
    if len(data) < 127:
        return bytes([len(data)]) + data
    rest, length = len(data) - 127, b"\x7f"
    while rest > 127:
        length += bytes([rest & 127 | 128])
        rest >>= 7
    return length + bytes([rest]) + data


def headers(stream: int, given: Mapping[str, str], *, end: bool = False) -> bytes:
    """A HEADERS frame of a POST; the path is in `given`."""
    fields = {":method": "POST", ":scheme": "http", ":authority": "a", **given}
    return frame(
        HEADERS, END_HEADERS | end * END_STREAM, stream, b"".join(literal(name, text) for name, text in fields.items())
    )


def data(stream: int, payload: bytes) -> bytes:
    """DATA frames that end a stream."""
    pieces = [payload[at : at + _LARGEST_FRAME] for at in range(0, len(payload), _LARGEST_FRAME)] or [b""]
    return b"".join(frame(DATA, (at == len(pieces) - 1) * END_STREAM, stream, each) for at, each in enumerate(pieces))


def message(payload: bytes, *, compressed: bool = False) -> bytes:
    """A message as gRPC frames it."""
    return struct.pack(">BI", compressed, len(payload)) + payload


def connect(port: int, window: int | None = None, timeout: float = 20) -> socket.socket:
    """A connection that has begun to speak HTTP/2; `window` is what it takes of each stream."""
    settings = b"" if window is None else struct.pack(">HI", INITIAL_WINDOW, window)
    connection = socket.create_connection(("127.0.0.1", port), timeout=timeout)
    connection.sendall(PREFACE + frame(SETTINGS, 0, 0, settings))
    return connection


def wait_for_end(connection: socket.socket) -> int:
    """Reads until the other side ends a stream; the kind of frame with which it does. Raises OSError."""
    left = b""
    while True:
        while len(left) >= 9 and len(left) >= 9 + int.from_bytes(left[:3], "big"):
            length, kind, flags = int.from_bytes(left[:3], "big"), left[3], left[4]
            left = left[9 + length :]
            if kind == RST_STREAM or (kind in {DATA, HEADERS} and flags & END_STREAM):
                return kind
            if kind == SETTINGS and not flags:
                connection.sendall(frame(SETTINGS, 1, 0, b""))
        received = connection.recv(65536)
        if not received:
            raise ConnectionResetError("the other side has closed the connection")
        left += received

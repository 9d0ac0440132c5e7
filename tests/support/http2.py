"""A hostile HTTP/2 client: frames made by hand, on plain sockets."""

from __future__ import annotations

import select
import socket
import struct
from collections.abc import Iterable, Mapping

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, RST_STREAM, SETTINGS, WINDOW_UPDATE = 0, 1, 3, 4, 8
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
    """A HEADERS frame of a POST; the path is in `given`. What begins with a colon comes first, as it has to."""
    fields = sorted({":method": "POST", ":scheme": "http", ":authority": "a", **given}.items())
    return frame(HEADERS, END_HEADERS | end * END_STREAM, stream, b"".join(literal(*field) for field in fields))


def message(payload: bytes, *, compressed: bool = False) -> bytes:
    """A message as gRPC frames it."""
    return struct.pack(">BI", compressed, len(payload)) + payload


class Connection:
    """A connection that keeps to the windows of the other side; `window` is what it takes of each stream itself."""

    def __init__(self, port: int, window: int | None = None, timeout: float = 60) -> None:
        self._socket = socket.create_connection(("127.0.0.1", port), timeout=timeout)
        self._received = b""
        self._room = self._initial = 65535
        self._rooms: dict[int, int] = {}
        # How each stream was ended by the other side: the kind of frame.
        self.ended: dict[int, int] = {}
        settings = b"" if window is None else struct.pack(">HI", INITIAL_WINDOW, window)
        self._socket.sendall(PREFACE + frame(SETTINGS, 0, 0, settings))

    def __enter__(self) -> Connection:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.close()

    def open(self, streams: Iterable[int], given: Mapping[str, str], payload: bytes | None = None) -> None:
        """Requests of these headers, all at once; with a payload, that fits the windows, they are whole."""
        for stream in streams:
            self._rooms[stream] = self._initial
        body = [] if payload is None else [payload]
        self._socket.sendall(
            b"".join(
                headers(stream, given) + b"".join(frame(DATA, END_STREAM, stream, each) for each in body)
                for stream in streams
            )
        )

    def send(self, stream: int, payload: bytes) -> None:
        """The rest of a request, as far as the other side wants it. Raises OSError."""
        for at in range(0, len(payload), _LARGEST_FRAME):
            piece = payload[at : at + _LARGEST_FRAME]
            while min(self._room, self._rooms[stream]) < len(piece) and stream not in self.ended:
                self._read()
            if stream in self.ended:
                return
            self._room -= len(piece)
            self._rooms[stream] -= len(piece)
            last = at + _LARGEST_FRAME >= len(payload)
            self._socket.sendall(frame(DATA, last * END_STREAM, stream, piece))

    def catch_up(self) -> None:
        """Takes in what has come. Raises OSError."""
        while select.select([self._socket], [], [], 0)[0]:
            self._read()

    def wait_for_end(self, stream: int) -> int:
        """Reads until the other side ends a stream; the kind of frame with which it does. Raises OSError."""
        while stream not in self.ended:
            self._read()
        return self.ended[stream]

    def _read(self) -> None:
        """Takes in one frame."""
        while len(self._received) < 9 or len(self._received) < 9 + int.from_bytes(self._received[:3], "big"):
            more = self._socket.recv(65536)
            if not more:
                raise ConnectionResetError("the other side has closed the connection")
            self._received += more
        length, kind, flags = int.from_bytes(self._received[:3], "big"), self._received[3], self._received[4]
        stream, payload = int.from_bytes(self._received[5:9], "big"), self._received[9 : 9 + length]
        self._received = self._received[9 + length :]
        if kind == RST_STREAM or (kind in {DATA, HEADERS} and flags & END_STREAM):
            self.ended.setdefault(stream, kind)
        elif kind == WINDOW_UPDATE and stream:
            self._rooms[stream] = self._rooms.get(stream, 0) + int.from_bytes(payload, "big")
        elif kind == WINDOW_UPDATE:
            self._room += int.from_bytes(payload, "big")
        elif kind == SETTINGS and not flags:
            for at in range(0, length, 6):
                name, value = struct.unpack(">HI", payload[at : at + 6])
                if name == INITIAL_WINDOW:
                    self._rooms = {each: room + value - self._initial for each, room in self._rooms.items()}
                    self._initial = value
            self._socket.sendall(frame(SETTINGS, 1, 0, b""))

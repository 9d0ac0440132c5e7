"""Attacks on the running stack, each for ten seconds or more, with a neighbour who notices nothing.

`make test-attack` runs them; docs/security.md has the waiting times that it prints.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import resource
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path

import pytest

from tests.attack.neighbour import Held, Neighbour, held
from tests.support import http2
from tests.support.stack import KEY, MODEL, Stack, launched

pytestmark = [pytest.mark.attack, pytest.mark.timeout(240)]

SECONDS = 10
# How much longer readers that take nothing stay.
STALLED_SECONDS = 12
ATTACKER = "attacker-key"
CREATE = "/completion.v1.CompletionService/CreateCompletion"
GRPC = {"content-type": "application/grpc", "te": "trailers"}
SOCKETS = 10_010


@pytest.fixture(scope="module")
def stack(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """Service and Envoy with two keys, the neighbour's and the attacker's."""
    keys = tmp_path_factory.mktemp("attack") / "keys"
    lines = [f"{hashlib.sha256(key.encode()).hexdigest()} {name}\n" for key, name in ((KEY, "me"), (ATTACKER, "them"))]
    keys.write_text("".join(lines))
    with launched(model_dir, "--api-keys-file", str(keys)) as running:
        with Neighbour(running).calling():  # until pools and arenas are filled, also by thousands of calls at once
            time.sleep(5)
            drop_streams(running, "wrong", time.monotonic() + SECONDS)
        yield running


def under(stack: Stack, name: str, attack: Callable[[float], None]) -> None:
    """Attacks until a time on the monotonic clock; the neighbour has no failure, and nothing is left afterwards."""
    before = held(stack)
    neighbour = Neighbour(stack)
    began = time.monotonic()
    with neighbour.calling():
        attack(began + SECONDS)
        assert time.monotonic() - began >= SECONDS
    print(f"\n{neighbour.report(name)}", flush=True)
    for failure in neighbour.failures[:5]:
        print(f"  {failure}")
    after = settled(stack, before)
    print(f"  before {before}\n  after  {after}", flush=True)
    assert not neighbour.failures
    assert after.as_before(before), (before, after)


def settled(stack: Stack, before: Held) -> Held:
    """The resources once they are as before, or after a minute: idle connections close after half of that."""
    deadline = time.monotonic() + 60
    while True:
        after = held(stack)
        if after.as_before(before) or time.monotonic() > deadline:
            return after
        time.sleep(0.5)


def wait_until(until: float) -> None:
    """Keeps up what has been set up."""
    time.sleep(max(0.0, until - time.monotonic()))


def at_once(count: int, until: float, attack: Callable[[], None]) -> None:
    """So many at a time, again and again."""

    def repeat() -> None:
        while time.monotonic() < until:
            with suppress(OSError):
                attack()

    with ThreadPoolExecutor(count) as pool:
        for each in [pool.submit(repeat) for _ in range(count)]:
            each.result()


def nested(field: int, payload: bytes) -> bytes:
    """A field of bytes, as protobuf has it."""
    length, digits = len(payload), b""
    while length > 127:
        digits += bytes([length & 127 | 128])
        length >>= 7
    return bytes([field << 3 | 2]) + digits + bytes([length]) + payload


BOMB = nested(6, nested(6, b"\n\0" * 8_000_000))  # json_prompt: a list of 8,000,000 empty values
SMALL_BOMB = gzip.compress(BOMB)
MESSAGE = http2.message(BOMB)


def test_messages_that_unfold(stack: Stack) -> None:
    """Ten compressed messages at once of 16 KB, which unfold to 16 MB and a thousand times the objects; no key."""

    def attack() -> None:
        with http2.Connection(stack.http) as connection:
            connection.open([1], {**GRPC, ":path": CREATE, "grpc-encoding": "gzip"})
            connection.send(1, http2.message(SMALL_BOMB, compressed=True))
            assert connection.wait_for_end(1) == http2.HEADERS

    under(stack, "10 messages of 16 KB, without a key", lambda until: at_once(10, until, attack))


@pytest.mark.parametrize("bearer", ["", "wrong"])
def test_large_messages(stack: Stack, bearer: str) -> None:
    """The same ten messages as they are, 16 MB each, with no key or a wrong one."""
    given = {"authorization": f"Bearer {bearer}"} if bearer else {}

    def attack() -> None:
        with http2.Connection(stack.http) as connection:
            connection.open([1], {**GRPC, ":path": CREATE, **given})
            connection.send(1, MESSAGE)
            assert connection.wait_for_end(1) == http2.HEADERS

    name = f"10 messages of 16 MB, {'a wrong' if bearer else 'without a'} key"
    under(stack, name, lambda until: at_once(10, until, attack))


def test_bodies_of_lists(stack: Stack) -> None:
    """Ten bodies at once of 2 MB of empty lists, without a key."""
    body = b'{"model":"%s","prompt":[[]%s]}' % (MODEL.encode(), b",[]" * 690_000)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: a\r\nContent-Length: {len(body)}\r\n\r\n".encode()

    def attack() -> None:
        with socket.create_connection(("127.0.0.1", stack.http), timeout=60) as connection:
            with suppress(OSError):  # answered before all is sent
                connection.sendall(head + body)
            connection.recv(4096)

    under(stack, "10 bodies of 2 MB, without a key", lambda until: at_once(10, until, attack))


def test_watches(stack: Stack) -> None:
    """4,200 watches of health over 42 connections, more than Envoy has calls at once; one that ends is begun anew."""
    head = {**GRPC, ":path": "/grpc.health.v1.Health/Watch"}

    def attack(until: float) -> None:
        with ExitStack() as open_:
            connections = [open_.enter_context(http2.Connection(stack.http)) for _ in range(42)]
            following = dict.fromkeys(connections, 1)
            while time.monotonic() < until:
                for connection in connections:
                    connection.catch_up()
                    first = following[connection]
                    following[connection] = last = 200 + 2 * len(connection.ended) + 1
                    connection.open(range(first, last, 2), head, http2.message(b""))
                time.sleep(0.5)

    under(stack, "42 x 100 watches of health", attack)


def test_silent_connections(stack: Stack) -> None:
    """10,010 connections on which nothing is ever sent."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < SOCKETS + 1000:
        pytest.skip(f"a process may have {hard} files open here, fewer than the attack needs")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    def attack(until: float) -> None:
        with ExitStack() as open_:
            for _ in range(SOCKETS):
                open_.enter_context(socket.create_connection(("127.0.0.1", stack.http), timeout=20))
            wait_until(until)

    try:
        under(stack, "10,010 silent connections", attack)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@pytest.mark.parametrize("bearer", ["", "wrong"])
def test_streams_that_are_dropped(stack: Stack, bearer: str) -> None:
    """40 connections of 98 streams, of which only the headers are sent, are closed at once; four times."""
    name = f"4 x 40 x 98 streams dropped, {'a wrong' if bearer else 'without a'} key"
    under(stack, name, lambda until: drop_streams(stack, bearer, until))


def drop_streams(stack: Stack, bearer: str, until: float) -> None:
    """Four waves of 40 connections of 98 streams each."""
    given = {"authorization": f"Bearer {bearer}"} if bearer else {}
    for left in (3, 2, 1, 0):
        with ExitStack() as open_:
            for _ in range(40):
                connection = open_.enter_context(http2.Connection(stack.http))
                connection.open(range(1, 196, 2), {**GRPC, ":path": CREATE, **given})
            wait_until(until - left * SECONDS / 4 - 1)
    wait_until(until)


def test_readers_that_take_nothing(stack: Stack) -> None:
    """Eight connections of 20 streams with a window of zero, all with one key."""
    fields = {"model": MODEL, "prompt": " " * 60_000, "echo": True, "max_tokens": 0, "n": 4, "stream": True}
    body = json.dumps(fields).encode()
    head = {
        ":path": "/v1/completions",
        "content-type": "application/json",
        "authorization": f"Bearer {ATTACKER}",
        "content-length": str(len(body)),
    }

    def attack(until: float) -> None:
        with ExitStack() as open_:
            threads = []
            for _ in range(8):
                connection = open_.enter_context(http2.Connection(stack.http, window=0, timeout=SECONDS + 30))
                thread = threading.Thread(target=send_all, args=(connection, head, body))
                thread.start()
                threads.append(thread)
            wait_until(until + STALLED_SECONDS)
            for each in threads:
                each.join()

    under(stack, "8 x 20 streams of a zero window, one key", attack)


def send_all(connection: http2.Connection, head: dict[str, str], body: bytes) -> None:
    """Twenty requests on a connection, one after the other as its window for what is sent lets through."""
    with suppress(OSError):
        for stream in range(1, 40, 2):
            connection.open([stream], head)
            connection.send(stream, body)

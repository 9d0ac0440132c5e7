"""Two replicas behind one Envoy that sends each session to one of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc

from tests.support.replicas import Pair, serving_pair
from tests.support.stack import AUTHORIZED, MODEL, Stack

Send = Callable[[Stack, dict[str, str]], None]


@pytest.fixture(scope="module")
def pair(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    with serving_pair(tiny_model, tmp_path_factory.mktemp("affinity"), affinity=True) as made:
        yield made


def by_rest(stack: Stack, headers: dict[str, str], tokens: int = 1) -> None:
    body = json.dumps({"model": MODEL, "prompt": "Once", "max_tokens": tokens, "ignore_eos": True})
    answer = stack.request("POST", "/v1/completions", body, {**AUTHORIZED, **headers})
    assert answer.status == 200, answer.body


def by_grpc(stack: Stack, headers: dict[str, str]) -> None:
    request = pb.CreateCompletionRequest(model=MODEL, text="Once", max_tokens=1)
    with grpc.insecure_channel(stack.envoy_address) as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        stub.CreateCompletion(request, metadata=list({**AUTHORIZED, **headers}.items()))


def went_to(pair: Pair, send: Send, headers: dict[str, str]) -> int:
    """The replica, 0 or 1, that a request with these headers was sent to."""
    before = pair.answered()
    send(pair.stack, headers)
    added = [after - earlier for after, earlier in zip(pair.answered(), before, strict=True)]
    assert sorted(added) == [0, 1]
    return added.index(1)


@pytest.mark.parametrize("send", [by_rest, by_grpc])
def test_a_session_keeps_its_replica(pair: Pair, send: Send) -> None:
    """Requests of one session go to one replica, and sixteen sessions to both."""
    homes = {f"s{number}": went_to(pair, send, {"x-session-id": f"s{number}"}) for number in range(16)}
    assert set(homes.values()) == {0, 1}
    for session, home in homes.items():
        assert [went_to(pair, send, {"x-session-id": session}) for _ in range(3)] == [home] * 3


def test_both_doors_agree(pair: Pair) -> None:
    """A session's replica is the same over REST and over gRPC."""
    for number in range(8):
        session = {"x-session-id": f"both-{number}"}
        assert went_to(pair, by_rest, session) == went_to(pair, by_grpc, session)


@pytest.mark.parametrize("send", [by_rest, by_grpc])
def test_without_a_session_the_key_decides(pair: Pair, send: Send) -> None:
    """One key's requests stay together, so do those whose session is too long to be one; other keys spread."""
    first = went_to(pair, send, {})
    assert [went_to(pair, send, {}) for _ in range(5)] == [first] * 5
    keys = [{"authorization": f"Bearer other-{number}"} for number in range(16)]
    assert {went_to(pair, send, key) for key in keys} == {0, 1}


def test_what_is_no_session_is_ignored(pair: Pair) -> None:
    """Over REST a session of more than 256 bytes is dropped: the key decides."""
    home = went_to(pair, by_rest, {})
    assert {went_to(pair, by_rest, {"x-session-id": f"{number}" * 257}) for number in range(8)} == {home}


def test_a_busy_replica_passes_sessions_on(pair: Pair) -> None:
    """Load is bounded: of sixteen requests of one session at once, the other replica gets some too."""
    before = pair.answered()
    with ThreadPoolExecutor(16) as pool:
        list(pool.map(lambda _: by_rest(pair.stack, {"x-session-id": "busy"}, tokens=64), range(16)))
    added = [after - earlier for after, earlier in zip(pair.answered(), before, strict=True)]
    assert sum(added) == 16
    assert min(added) >= 4


def test_sessions_of_a_killed_replica_move(pair: Pair) -> None:
    """None of their requests fails, those of the other stay, and all go home once it is back."""
    sessions = [{"x-session-id": f"moved-{number}"} for number in range(12)]
    homes = [went_to(pair, by_rest, session) for session in sessions]
    assert set(homes) == {0, 1}
    pair.replicas[0].kill()
    for session in sessions:
        by_rest(pair.stack, session)
    # The killed one is known by now: requests are no longer sent to it first.
    pair.wait_for_health([False, True])
    assert {went_to(pair, by_rest, session) for session in sessions} == {1}
    pair.replicas[0].start()
    pair.wait_until_both_serve()
    assert [went_to(pair, by_rest, session) for session in sessions] == homes

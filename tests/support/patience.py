"""How long tests wait: until the thing itself is there, however slow the machine is."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterable
from typing import TypeVar

import grpc
import pytest

T = TypeVar("T")

# In seconds: only a bound against hanging. What a test waits for takes less than a tenth of it on an ordinary machine.
PATIENCE = 600
# Settings of the service that a slow machine would exceed as they are by default, as the environment gives them.
PATIENT_SERVICE = {
    f"COMPLETION_{name}_SECONDS": str(PATIENCE) for name in ("MAX_QUEUE", "SEND_TIMEOUT", "WATCHDOG", "DRAIN")
}


def eventually(condition: Callable[[], T], state: Callable[[], object] = lambda: "") -> T:
    """The condition's first true result. Fails after PATIENCE seconds, and says in what `state`."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {state()}"
        time.sleep(0.01)
    return result


async def eventually_async(condition: Callable[[], T | Awaitable[T]], state: Callable[[], object] = lambda: "") -> T:
    """`eventually`, while the event loop goes on."""
    deadline = time.monotonic() + PATIENCE
    while not (result := await _awaited(condition())):
        assert time.monotonic() < deadline, f"not within {PATIENCE} s: {state()}"
        await asyncio.sleep(0.002)
    return result


async def _awaited(result: T | Awaitable[T]) -> T:
    return await result if isinstance(result, Awaitable) else result


def ended_by_deadline(stream: Callable[[float], Iterable[object]]) -> None:
    """The end of a stream by its deadline: tries longer deadlines until the stream begins before one."""
    for seconds in (0.5, 5, 50):
        pieces = []
        with pytest.raises(grpc.RpcError) as caught:
            pieces.extend(stream(seconds))
        assert caught.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
        if pieces:
            return
    raise AssertionError("no stream begins before its deadline")

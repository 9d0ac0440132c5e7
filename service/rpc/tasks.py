"""Calls that end although their caller takes nothing, not even the end.

A status waits behind the message that the caller does not read. gRPC resets a call whose last reference goes, and two
tasks refer to it: the one that answers, in which handlers run, and the one that began it and listens for the caller's
leaving.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Coroutine
from typing import Any

_listeners: weakref.WeakKeyDictionary[asyncio.Task[Any], weakref.ref[asyncio.Task[Any]]] = weakref.WeakKeyDictionary()
# gRPC's name for what answers a call.
_ANSWERING = "_handle_exceptions"


def remember(loop: asyncio.AbstractEventLoop) -> None:
    """Has the loop remember which task listens for which answering one; else `cut_off_in` does nothing."""
    make: Any = _make  # the stubs want a protocol of their own
    loop.set_task_factory(make)


def _make(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    if getattr(coroutine, "__name__", None) == _ANSWERING:
        listener = asyncio.current_task(loop)
        if listener is not None:
            _listeners[task] = weakref.ref(listener)
    return task


def cut_off_in(seconds: float) -> None:
    """Ends the current task's call after this many seconds, unless it has ended by then."""
    task = asyncio.current_task()
    found = _listeners.get(task) if task is not None else None
    listener = found() if found is not None else None
    if listener is not None:
        asyncio.get_running_loop().call_later(seconds, listener.cancel)

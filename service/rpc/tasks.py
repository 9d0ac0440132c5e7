"""Ends calls whose callers read nothing, not even the status.

The status waits behind the message that the caller does not read. gRPC resets a call when its last reference is gone.
Two tasks hold one: the task that answers, which runs the handler, and the task that started it and waits for the
caller to leave.
"""

from __future__ import annotations

import asyncio
import weakref
from collections.abc import Coroutine
from typing import Any

_listeners: weakref.WeakKeyDictionary[asyncio.Task[Any], weakref.ref[asyncio.Task[Any]]] = weakref.WeakKeyDictionary()
# gRPC's name for the coroutine that answers a call.
_ANSWERING = "_handle_exceptions"


def remember(loop: asyncio.AbstractEventLoop) -> None:
    """Makes the loop record which task started each answering task. Without this `cut_off_in` does nothing."""
    make: Any = _make  # the type stubs expect a protocol of their own
    loop.set_task_factory(make)


def _make(loop: asyncio.AbstractEventLoop, coroutine: Coroutine[Any, Any, Any], **options: Any) -> asyncio.Task[Any]:
    task: asyncio.Task[Any] = asyncio.Task(coroutine, loop=loop, **options)
    if getattr(coroutine, "__name__", None) == _ANSWERING:
        listener = asyncio.current_task(loop)
        if listener is not None:
            _listeners[task] = weakref.ref(listener)
    return task


def cut_off_in(seconds: float) -> None:
    """Ends the current task's call after `seconds`, unless it has ended by then."""
    task = asyncio.current_task()
    reference = _listeners.get(task) if task is not None else None
    listener = reference() if reference is not None else None
    if listener is not None:
        asyncio.get_running_loop().call_later(seconds, listener.cancel)

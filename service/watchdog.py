"""Notices an engine whose step never ends."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

_LOOKS = 10


async def hung(turn: Callable[[], int | None], seconds: float) -> None:
    """Returns once the same turn has been under way for `seconds`, and up to a fifth more; `turn` gives its number.

    It counts its own looks, not the clock: a process that was stopped for a while, and goes on, does not hang.
    """
    seen, same = turn(), 0
    while same < _LOOKS:
        await asyncio.sleep(seconds / _LOOKS)
        now = turn()
        same = same + 1 if now is not None and now == seen else 0
        seen = now

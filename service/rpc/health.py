"""What the health service says: names for who balances load, and for orchestrators' probes."""

from __future__ import annotations

import asyncio
from typing import Any

from completion.v1 import completion_pb2
from grpc_health.v1 import health, health_pb2

SERVICE_NAME = completion_pb2.DESCRIPTOR.services_by_name["CompletionService"].full_name
# Whether to send requests: the service's own name, the empty one for the whole server, and what orchestrators call it.
READINESS = (SERVICE_NAME, "", "readiness")
# Whether the start is over, and whether the process is of use at all: both stay true while it drains.
STARTUP, LIVENESS = "startup", "liveness"


class Health(health.aio.HealthServicer):  # type: ignore[misc]
    """Health whose watches can be ended: they would hold up a drain for as long as their callers like."""

    def __init__(self) -> None:
        super().__init__()
        self._watches: set[asyncio.Task[Any]] = set()

    async def Watch(self, request: Any, context: Any) -> None:  # noqa: N802, the contract's name
        task = asyncio.current_task()
        assert task is not None
        self._watches.add(task)
        try:
            await super().Watch(request, context)
        finally:
            self._watches.discard(task)

    def end_watches(self) -> None:
        """Ends every watch."""
        for task in self._watches:
            task.cancel()

    async def say(self, serving: bool, *names: str) -> None:
        """From now on the names are SERVING, or NOT_SERVING."""
        answers = health_pb2.HealthCheckResponse
        for name in names:
            await self.set(name, answers.SERVING if serving else answers.NOT_SERVING)

"""The health service: one status per name, for load balancers and for orchestrators' probes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import TypeAlias

import grpc
from completion.v1 import completion_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc

from service.rpc.calls import Context

SERVICE_NAME = completion_pb2.DESCRIPTOR.services_by_name["CompletionService"].full_name
# These names say whether to send requests: the service's name, the empty name of the whole server, and "readiness".
READINESS = (SERVICE_NAME, "", "readiness")
# These names say whether the start is complete, and whether the process works; both stay SERVING during a drain.
STARTUP, LIVENESS = "startup", "liveness"

_Answer: TypeAlias = health_pb2.HealthCheckResponse


class Health(health_pb2_grpc.HealthServicer):  # type: ignore[misc]
    """Implements grpc.health.v1.Health. A watcher that does not read delays no other.

    `watches` is the number of open watches.
    """

    def __init__(self) -> None:
        self._statuses: dict[str, int] = {}
        self._changed = asyncio.Event()  # set at the next change, which replaces it
        self._over = False
        self.watches = 0

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> _Answer:  # noqa: N802
        status = self._statuses.get(request.service)
        if status is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "unknown service")
        return _Answer(status=status)

    async def List(self, _: health_pb2.HealthListRequest, __: Context) -> health_pb2.HealthListResponse:  # noqa: N802
        statuses = {name: _Answer(status=status) for name, status in self._statuses.items()}
        return health_pb2.HealthListResponse(statuses=statuses)

    async def Watch(  # noqa: N802
        self, request: health_pb2.HealthCheckRequest, _: Context
    ) -> AsyncIterator[_Answer]:
        last = None
        self.watches += 1
        try:
            while not self._over:
                changed = self._changed
                status = self._statuses.get(request.service, _Answer.SERVICE_UNKNOWN)
                if status == last:
                    await changed.wait()
                else:  # the status may change while the caller reads this one
                    last = status
                    yield _Answer(status=status)
        finally:
            self.watches -= 1

    def end_watches(self) -> None:
        """Ends every watch; otherwise callers could delay the drain without limit."""
        self._over = True
        self._wake()

    def set_serving(self, serving: bool, *names: str) -> None:
        """Sets the names to SERVING, or to NOT_SERVING."""
        for name in names:
            self._statuses[name] = _Answer.SERVING if serving else _Answer.NOT_SERVING
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

"""The running calls: limits per method and per caller, and the end of calls whose key was revoked."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from contextlib import contextmanager

from service.errors import AuthenticationError, OverloadedError
from service.rpc.calls import RpcCall
from service.telemetry.observer import Method

# Methods whose calls last as long as their callers like.
_MAX_LASTING = {"Watch": 256, "ServerReflectionInfo": 16}
# Half of Envoy's limit of concurrent requests, so that one caller cannot lock out the others.
_MAX_PER_CALLER = 2048
# Bytes of one caller's unstreamed answers that are being made or are not read yet.
_MAX_HELD = 64 << 20


class Running:
    """Counts calls and the bytes of their answers.

    Invariant: the counts are those of the calls inside `lasting` and `admitted`, and of the bytes that these hold.
    """

    def __init__(self) -> None:
        self.lasting_calls: Counter[str] = Counter()
        self._calls: dict[str, set[RpcCall]] = defaultdict(set)
        self._held: Counter[str] = Counter()

    @property
    def calls(self) -> int:
        """The number of running calls."""
        return sum(map(len, self._calls.values()))

    @property
    def held(self) -> int:
        """Bytes of all unstreamed answers that are being made or are not read yet."""
        return self._held.total()

    @contextmanager
    def lasting(self, method: Method) -> Iterator[None]:
        """Surrounds a call of this method. Raises OverloadedError if too many calls of the method are open."""
        most = _MAX_LASTING.get(method.name)
        if most is not None and self.lasting_calls[method.name] >= most:
            message = f"Too many calls of {method.name} are open: at most {most} can be. Please retry later."
            raise OverloadedError(message, retry_after=1.0)
        self.lasting_calls[method.name] += 1
        try:
            yield
        finally:
            self.lasting_calls[method.name] -= 1

    @contextmanager
    def admitted(self, identity: str, call: RpcCall) -> Iterator[None]:
        """Surrounds a caller's call. Raises OverloadedError if the caller has too many open."""
        calls = self._calls[identity]
        if len(calls) >= _MAX_PER_CALLER:
            message = f"Too many of your requests are open: at most {_MAX_PER_CALLER} can be. Please retry later."
            raise OverloadedError(message, retry_after=1.0)
        calls.add(call)
        mine = 0

        def hold(count: int) -> None:
            nonlocal mine
            if self._held[identity] + count > _MAX_HELD and self._held[identity]:
                raise OverloadedError(
                    f"About {self._held[identity] >> 20} MiB of your answers are being made or were not read yet, and "
                    f"this one has about {count >> 20} MiB more: at most {_MAX_HELD >> 20} MiB may wait. Please read "
                    "them first, or stream.",
                    retry_after=1.0,
                )
            mine += count
            self._held[identity] += count

        call.hold = hold
        try:
            yield
        finally:
            calls.discard(call)
            self._held[identity] -= mine
            if not calls:
                del self._calls[identity], self._held[identity]

    def revoke(self, keys: Collection[str]) -> None:
        """Ends the calls that came with these keys, which were revoked."""
        if keys:
            for call in [call for calls in self._calls.values() for call in calls if call.caller.key in keys]:
                call.end(AuthenticationError("The API key has been revoked.", code="invalid_api_key"))

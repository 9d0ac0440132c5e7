"""Wires models, RPCs, health and reflection into one server, starts it, and drains it at the end."""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

import grpc
from completion.v1 import completion_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service.engine.cache import Reuse
from service.engine.engine import Faults, Stats
from service.errors import EngineFaultError, StartupError, UnavailableError
from service.host import memory, ports
from service.host.processor import processor
from service.rpc import tasks, tls
from service.rpc.health import LIVENESS, READINESS, SERVICE_NAME, STARTUP, Health
from service.rpc.interceptors import CallInterceptor
from service.rpc.keys import KeyRing
from service.rpc.quota import Meter, Quota
from service.rpc.running import Running
from service.rpc.servicer import CompletionServicer, ServedModel
from service.rpc.workers import Workers
from service.serving import models
from service.settings import Settings
from service.telemetry.exporter import Exporter
from service.telemetry.log import get_logger
from service.telemetry.metrics import Metrics, Reading

if TYPE_CHECKING:
    from service.telemetry.tracing import Tracing

_log = get_logger(__name__)

# In seconds: the time for the errors of terminated calls to reach their callers.
LAST_ERRORS_SECONDS = 2.0
# More concurrent calls than Envoy sends to all replicas. It bounds the memory for callers without Envoy.
_MAX_CALLS = 8192
# How often the key file is checked for changes.
_KEYS_SECONDS = 1.0
# How often freed memory is returned to the system while the service is idle.
_IDLE_SECONDS = 10.0


def check_host(settings: Settings, keys: KeyRing) -> None:
    """Raises StartupError when other machines could call the service without a key."""
    if keys.open and not settings.host.is_loopback:
        raise StartupError(
            f"host {settings.host} is not loopback: listening there needs an API key file (--api-keys-file)"
        )


def _tracing(endpoint: str | None) -> Tracing | None:
    """An observer that sends traces to this collector; None without an endpoint."""
    if endpoint is None:
        return None
    from service.telemetry.tracing import Tracing  # noqa: PLC0415, an optional extra

    return Tracing(endpoint)


def check_tracing(endpoint: str | None) -> None:
    """Raises StartupError when traces are to be sent and OpenTelemetry is not installed."""
    if endpoint is None:
        return
    try:
        import service.telemetry.tracing  # noqa: F401, PLC0415, see above
    except ImportError as error:
        message = f"otlp_endpoint needs OpenTelemetry ({error.name} is missing): pip install 'completion-service[otel]'"
        raise StartupError(message) from None


class Server:
    """The running service. As an async context manager it serves inside the block, and drains at the block's end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.keys = KeyRing.load(settings.api_keys_file)
        check_host(settings, self.keys)
        check_tracing(settings.otlp_endpoint)
        self._tls = tls.load(settings)
        self.models = models.load(settings)
        self._workers = Workers(2, "parsing")
        self._running = Running()
        self._reload_requested = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._health = Health()
        self._metrics = self._make_metrics()
        self._exporter: Exporter | None = None
        self._tracing = _tracing(settings.otlp_endpoint)
        observers = [observer for observer in (self._metrics, self._tracing) if observer is not None]
        quota = Quota(settings.tokens_per_minute, settings.max_sequences, settings.requests_per_minute)
        self._meter = Meter(quota)
        interceptor = CallInterceptor(
            self.keys,
            self._workers,
            self._meter,
            self._running,
            *observers,
            send_timeout=settings.send_timeout_seconds,
            ignore_unknown=settings.unknown_parameters == "ignore",
        )
        self._server = grpc.aio.server(
            interceptors=[interceptor],
            options=self._options(),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        self._add_services()

    def _make_metrics(self) -> Metrics | None:
        if not self._settings.metrics_port:
            return None
        certificate = self._tls
        return Metrics(
            self._read,
            vllm_names=self._settings.vllm_metric_names,
            certificate_expires=None if certificate is None else lambda: certificate.expires,
        )

    def _read(self) -> dict[str, Reading]:
        return {model.id: models.reading(model) for model in self.models}

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._settings.max_message_bytes),
            # Bit 0 is identity: a compressed message fails with UNIMPLEMENTED and is never decompressed.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            # Calls that gRPC has received and not yet dispatched. Beyond this number it cancels calls at random.
            ("grpc.server.max_pending_requests", _MAX_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", _MAX_CALLS),
            # Between a soft and a hard limit gRPC refuses at random, so both limits are equal.
            ("grpc.max_metadata_size", 8 << 10),
            ("grpc.absolute_max_metadata_size", 8 << 10),
            # Envoy sends pings to keep idle streams open; by default gRPC would treat so many pings as an attack.
            ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
            ("grpc.keepalive_permit_without_calls", 1),
            ("grpc.keepalive_time_ms", 30_000),
            ("grpc.keepalive_timeout_ms", 10_000),
        ]

    def _add_services(self) -> None:
        completion_pb2_grpc.add_CompletionServiceServicer_to_server(
            CompletionServicer(self.models, self._workers, self._meter, self._settings.longest_request_seconds),
            self._server,
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        health = health_pb2.DESCRIPTOR.services_by_name["Health"].full_name
        names = (SERVICE_NAME, health, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    @property
    def address(self) -> str:
        """The address that the service listens on, as host:port."""
        host = self._settings.host
        return f"[{host}]:{self._settings.port}" if host.version == 6 else f"{host}:{self._settings.port}"

    async def __aenter__(self) -> Server:
        self._bind()
        self._export_metrics()
        loop = asyncio.get_running_loop()
        tasks.remember(loop)
        for model in self.models:
            model.engine.start(loop, self._metrics and self._metrics.engine(model.id))
        self._health.set_serving(False, *READINESS, STARTUP)
        self._health.set_serving(True, LIVENESS)
        await self._server.start()
        await self._warm_up()
        self._health.set_serving(True, *READINESS, STARTUP)
        metrics = self._exporter and self._exporter.address
        served = [model.id for model in self.models]
        _log.info("serving", address=self.address, models=served, metrics=metrics, processor=str(processor()))
        self._tasks = [asyncio.ensure_future(self._follow_keys()), asyncio.ensure_future(self._trim_memory())]
        if self.keys.open:
            _log.warning("no API key file: callers need no key, and the service listens on loopback only")
        return self

    async def __aexit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.announce_end()
        dead = self.dead_models()
        if dead:
            self._health.set_serving(False, LIVENESS)
        await self._stop(0.0 if dead else self._settings.drain_seconds)

    async def _stop(self, seconds: float) -> None:
        """Ends everything. Running calls have `seconds` to finish; no new ones are accepted."""
        # The engines end calls that outlast the drain with an error, before gRPC closes their connections.
        engines = [model.engine for model in self.models]
        stopped = asyncio.ensure_future(self._server.stop(seconds + LAST_ERRORS_SECONDS))
        asyncio.get_running_loop().call_later(LAST_ERRORS_SECONDS / 4, self._health.end_watches)
        await asyncio.wait([stopped], timeout=seconds)
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in engines))
        await stopped
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._workers.shutdown()
        for sender in (self._exporter, self._tracing):
            if sender is not None:
                await asyncio.to_thread(sender.close)
        _log.info("stopped", **sums(engine.reuse for engine in engines), **sums(engine.faults for engine in engines))

    def _bind(self) -> None:
        try:
            if self._tls is None:
                self._server.add_insecure_port(self.address)
            else:
                self._server.add_secure_port(self.address, self._tls.credentials())
        except RuntimeError as error:
            pid = ports.listener(self._settings.port)
            if pid is None:
                raise StartupError(f"cannot listen on {self.address}: is the port in use? ({error})") from None
            message = f"cannot listen on {self.address}: port {self._settings.port} is in use (pid {pid})"
            raise StartupError(f"{message}; stop that process, or choose another port (--port)") from None

    def _export_metrics(self) -> None:
        """Serves metrics. A configured port must be free; if the default port is in use, there are no metrics."""
        if self._metrics is None:
            return
        host, port = str(self._settings.metrics_host), self._settings.metrics_port
        try:
            self._exporter = Exporter(self._metrics.registry, host, port)
        except OSError as error:
            message = f"cannot serve metrics on {host} port {port}: {error.strerror}"
            if "metrics_port" in self._settings.model_fields_set:
                raise StartupError(f"{message}; choose another port (--metrics-port), or 0 for none") from None
            _log.warning(f"{message}; the service starts without metrics")

    async def _follow_keys(self) -> None:
        """Reads the key file on a thread whenever it has changed, and ends the calls of removed keys."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._reload_requested.wait(), _KEYS_SECONDS)
            read = self.keys.reload if self._reload_requested.is_set() else self.keys.follow
            self._reload_requested.clear()
            self._running.revoke(await asyncio.to_thread(read))

    async def _trim_memory(self) -> None:
        """Returns freed memory to the system, on a thread, while no sequence runs or waits."""
        while True:
            await asyncio.sleep(_IDLE_SECONDS)
            stats = [model.engine.stats for model in self.models]
            if not any(count.running or count.waiting for count in stats):
                await asyncio.to_thread(memory.trim)

    def reload_keys(self) -> None:
        """Reads the key file again soon, whether it has changed or not."""
        self._reload_requested.set()

    async def _warm_up(self) -> None:
        """Runs requests of the service's own on each model, one after the other, before the service is ready."""
        for model in self.models:
            try:
                for request in models.warm_up_requests(model):
                    await model.engine.warm_up(request)
            except (EngineFaultError, UnavailableError):
                await self._stop(0)
                message = f"the model {model.id} cannot answer: the warm-up request failed; the log has the cause"
                raise StartupError(message) from None

    def announce_end(self) -> None:
        """Sets readiness to NOT_SERVING, so that load balancers send no new requests; any that come are accepted."""
        self._health.set_serving(False, *READINESS)

    def dead_models(self) -> list[str]:
        """The ids of the models whose engines have died."""
        return [model.id for model in self.models if model.engine.died.is_set()]

    def abandon(self, hung: ServedModel) -> None:
        """Ends every call with an error and sets liveness to NOT_SERVING, because the engine of a model hangs."""
        self._health.set_serving(False, *READINESS, LIVENESS)
        for model in self.models:
            model.engine.abandon(hangs=model is hung)


def sums(counts: Iterable[Stats | Reuse | Faults]) -> dict[str, int]:
    """The counts of all engines together, by name."""
    total: Counter[str] = Counter()
    for count in counts:
        total.update(dataclasses.asdict(count))
    return dict(total)

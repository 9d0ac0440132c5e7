"""Wires the service together: models, RPCs, health and reflection; starts it, and drains it at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import logging
import os
import signal
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING

import grpc
from completion.v1 import completion_pb2_grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service import watchdog
from service.engine.cache import Reuse
from service.engine.engine import Faults, Stats
from service.errors import EngineDiedError, EngineFaultError, StartupError, UnavailableError
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

_LAST_WORDS_SECONDS = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# More calls at once than Envoy sends to all replicas together: a bound on memory for who comes without it.
_MAX_CALLS = 8192
# How often the key file is looked at.
_KEYS_SECONDS = 1.0
# How often memory is given back while nothing runs.
_IDLE_SECONDS = 10.0


def check_host(settings: Settings, keys: KeyRing) -> None:
    """Raises StartupError when others than this machine could call without a key."""
    if keys.open and not settings.host.is_loopback:
        raise StartupError(
            f"host {settings.host} is not loopback: listening there needs an API key file (--api-keys-file)"
        )


def _tracing(endpoint: str | None) -> Tracing | None:
    """Traces to this collector."""
    if endpoint is None:
        return None
    from service.telemetry.tracing import Tracing  # noqa: PLC0415, an extra that most do without

    return Tracing(endpoint)


def check_tracing(endpoint: str | None) -> None:
    """Raises StartupError where there are to be traces and OpenTelemetry is not installed."""
    if endpoint is None:
        return
    try:
        import service.telemetry.tracing  # noqa: F401, PLC0415, see above
    except ImportError as error:
        message = f"otlp_endpoint needs OpenTelemetry ({error.name} is missing): pip install 'completion-service[otel]'"
        raise StartupError(message) from None


class Server:
    """The running service. As an async context manager it serves inside the block and drains at its end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.keys = KeyRing.load(settings.api_keys_file)
        check_host(settings, self.keys)
        check_tracing(settings.otlp_endpoint)
        self._tls = tls.load(settings)
        self.models = models.load(settings)
        self._workers = Workers(2, "parsing")
        self._running = Running()
        self._look_at_keys = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._health = Health()
        self._metrics = self._make_metrics()
        self._exporter: Exporter | None = None
        self._tracing = _tracing(settings.otlp_endpoint)
        observers = [each for each in (self._metrics, self._tracing) if each is not None]
        quota = Quota(settings.tokens_per_minute, settings.max_sequences, settings.requests_per_minute)
        self._meter = Meter(quota)
        interceptor = CallInterceptor(
            self.keys,
            self._workers,
            self._meter,
            self._running,
            *observers,
            send_timeout=settings.send_timeout_seconds,
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
            # Bit 0 is identity: compressed messages are UNIMPLEMENTED, and nothing of them is decompressed.
            ("grpc.compression_enabled_algorithms_bitset", 1),
            # What has come and was not looked at yet: beyond it gRPC cancels calls at random, whosever they are.
            ("grpc.server.max_pending_requests", _MAX_CALLS),
            ("grpc.server.max_pending_requests_hard_limit", _MAX_CALLS),
            # Between a soft and a hard limit gRPC refuses at random: these are the same.
            ("grpc.max_metadata_size", 8 << 10),
            ("grpc.absolute_max_metadata_size", 8 << 10),
            # Envoy's pings keep quiet streams open; without these the server takes them for an attack.
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
        """Where the service listens, as host:port."""
        host = self._settings.host
        return f"[{host}]:{self._settings.port}" if host.version == 6 else f"{host}:{self._settings.port}"

    async def __aenter__(self) -> Server:
        self._bind()
        self._export_metrics()
        loop = asyncio.get_running_loop()
        tasks.remember(loop)
        for model in self.models:
            model.engine.start(loop)
        self._health.say(False, *READINESS, STARTUP)
        self._health.say(True, LIVENESS)
        await self._server.start()
        await self._warm_up()
        self._health.say(True, *READINESS, STARTUP)
        metrics = self._exporter and self._exporter.address
        served = [each.id for each in self.models]
        _log.info("serving", address=self.address, models=served, metrics=metrics, processor=str(processor()))
        self._tasks = [asyncio.ensure_future(self._follow_keys()), asyncio.ensure_future(self._give_back())]
        if self.keys.open:
            _log.warning("no API key file: no key is asked for, and only loopback is listened on")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.announce_end()
        dead = self.dead_models()
        if dead:
            self._health.say(False, LIVENESS)
        await self._stop(0.0 if dead else self._settings.drain_seconds)

    async def _stop(self, seconds: float) -> None:
        """Ends everything; what runs has so many seconds to finish."""
        # No new calls from here on. Those that outlast the drain hear why from the engine, before gRPC cuts them off.
        engines = [model.engine for model in self.models]
        stopped = asyncio.ensure_future(self._server.stop(seconds + _LAST_WORDS_SECONDS))
        asyncio.get_running_loop().call_later(_LAST_WORDS_SECONDS / 4, self._health.end_watches)
        await asyncio.wait([stopped], timeout=seconds)
        await asyncio.gather(*(asyncio.to_thread(engine.stop) for engine in engines))
        await stopped
        for task in self._tasks:
            task.cancel()
        if self._tasks:
            await asyncio.wait(self._tasks)
        self._workers.shutdown()
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        _log.info("stopped", **_sums(each.reuse for each in engines), **_sums(each.faults for each in engines))

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
        """Serves metrics. That the default port is taken is no reason not to start: nobody has asked for it."""
        if self._metrics is None:
            return
        host, port = str(self._settings.metrics_host), self._settings.metrics_port
        try:
            self._exporter = Exporter(self._metrics.registry, host, port)
        except OSError as error:
            message = f"cannot serve metrics on {host} port {port}: {error.strerror}"
            if "metrics_port" in self._settings.model_fields_set:
                raise StartupError(f"{message}; choose another port (--metrics-port), or 0 for none") from None
            _log.warning(f"{message}; there are none")

    async def _follow_keys(self) -> None:
        """Reads the key file whenever it has changed, on a thread; calls with a key that is gone end."""
        while True:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._look_at_keys.wait(), _KEYS_SECONDS)
            read = self.keys.reload if self._look_at_keys.is_set() else self.keys.follow
            self._look_at_keys.clear()
            self._running.revoke(await asyncio.to_thread(read))

    async def _give_back(self) -> None:
        """Gives memory back, on a thread, while nothing runs or waits."""
        while True:
            await asyncio.sleep(_IDLE_SECONDS)
            stats = [model.engine.stats for model in self.models]
            if not any(each.running or each.waiting for each in stats):
                await asyncio.to_thread(memory.give_back)

    def reload_keys(self) -> None:
        """Has the key file be read again, changed or not."""
        self._look_at_keys.set()

    async def _warm_up(self) -> None:
        """Has each model answer a request of the service's own, one after the other: only then is the service ready."""
        for model in self.models:
            try:
                await model.engine.warm_up(models.warm_up_request(model))
            except (EngineFaultError, UnavailableError):
                await self._stop(0)
                message = f"the model {model.id} cannot answer: the warm-up request failed; the log says of what"
                raise StartupError(message) from None
            if self._metrics is not None:
                model.engine.observe(self._metrics.engine(model.id))

    def announce_end(self) -> None:
        """Has health say NOT_SERVING, so that who asks sends no new requests; they are still taken."""
        self._health.say(False, *READINESS)

    def dead_models(self) -> list[str]:
        """The ids of the models whose engines have died."""
        return [model.id for model in self.models if model.engine.died.is_set()]

    async def end_if_hung(self, model: ServedModel) -> None:
        """Watches a model's engine. When a step never ends, all callers hear of it, and the process exits with 1."""
        seconds = self._settings.watchdog_seconds
        await watchdog.hung(lambda: model.engine.turn, seconds)
        stats = dataclasses.asdict(model.engine.stats)
        _log.critical("the engine hangs", model=model.id, seconds=seconds, **stats)
        self._health.say(False, *READINESS, LIVENESS)
        for each in self.models:
            each.engine.abandon()
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        _die()


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish; a second signal ends the process at once.

    Raises EngineDiedError when a model has no engine any more: a supervisor should start the process again.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:  # while models load the loop hears nothing, and nothing has been taken that could be lost
        signal.signal(number, lambda number, _: os._exit(128 + number))
    server = Server(settings)

    def end() -> None:
        stop.set()
        for number in _SIGNALS:
            loop.add_signal_handler(number, os._exit, 128 + number)

    def hung() -> None:
        _log.critical("the event loop hangs", seconds=settings.watchdog_seconds)
        _die()

    for number in _SIGNALS:
        loop.add_signal_handler(number, end)
    loop.add_signal_handler(signal.SIGHUP, server.reload_keys)
    engines = [model.engine for model in server.models]
    deaths = [engine.died for engine in engines]
    watching = [asyncio.ensure_future(server.end_if_hung(model)) for model in server.models]
    with watchdog.Heartbeat(loop, settings.watchdog_seconds, hung):
        async with server:
            await _first(stop, *deaths)
            end()
            _log.info("draining", **_sums(engine.stats for engine in engines))
            server.announce_end()
            await _first(*deaths, within=settings.drain_delay_seconds)
    for watch in watching:
        watch.cancel()
    if dead := server.dead_models():
        raise EngineDiedError(f"the engine has died ({', '.join(dead)}); the log says of what")


def _die() -> None:
    """Ends a process that is of no use, with every thread's stack on standard error."""
    try:
        faulthandler.dump_traceback(all_threads=True)
        logging.shutdown()
    finally:
        os._exit(1)


def _sums(counts: Iterable[Stats | Reuse | Faults]) -> dict[str, int]:
    """The counts of all engines together, by name."""
    total: Counter[str] = Counter()
    for each in counts:
        total.update(dataclasses.asdict(each))
    return dict(total)


async def _first(*events: asyncio.Event, within: float | None = None) -> None:
    """Waits until one of the events is set, or for so many seconds."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()

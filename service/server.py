"""Wires the service together: model, engine, RPCs, health and reflection; starts it, and drains it at the end."""

from __future__ import annotations

import asyncio
import dataclasses
import faulthandler
import logging
import os
import signal
from concurrent.futures import ThreadPoolExecutor
from types import TracebackType
from typing import TYPE_CHECKING, Any

import grpc
from completion.v1 import completion_pb2, completion_pb2_grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from service import manifest as manifests
from service import memory, placement, ports, watchdog
from service.engine.cache import KVCache
from service.engine.engine import Engine
from service.engine.model import Model
from service.engine.scheduler import Scheduler
from service.errors import EngineDiedError, EngineFaultError, StartupError, UnavailableError
from service.metrics import Exporter, Metrics, Reading
from service.observer import Observer
from service.rpc import tls
from service.rpc.interceptors import CallInterceptor
from service.rpc.keys import KeyRing
from service.rpc.parse import Limits
from service.rpc.quota import Quota
from service.rpc.servicer import CompletionServicer, ServedModel
from service.settings import Settings
from service.text.tokenizer import Tokenizer
from service.types import Prompt, Request, SamplingParams

if TYPE_CHECKING:
    from service.tracing import Tracing

_log = logging.getLogger(__name__)

SERVICE_NAME = completion_pb2.DESCRIPTOR.services_by_name["CompletionService"].full_name
# Whether to send requests: the service's own name, the empty one for the whole server, and what orchestrators call it.
_READINESS = (SERVICE_NAME, "", "readiness")
# Whether the start is over, and whether the process is of use at all: both stay true while it drains.
_STARTUP, _LIVENESS = "startup", "liveness"
# What is generated to warm up: the prompt's step, and steps of the other graph.
_WARM_UP_TOKENS = 3

_LAST_WORDS_SECONDS = 2.0
_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# More calls at once than Envoy sends to all replicas together: a bound on memory for who comes without it.
_MAX_CALLS = 8192


def load_model(settings: Settings) -> ServedModel:
    """The model that the settings name, checked and ready to start. Raises StartupError."""
    manifest = manifests.load(settings.model_dir)
    manifests.check_external_data(settings.model_dir, manifest)
    length = context_length(manifest, settings)
    settings = placement.settled(manifest, settings)
    device, slots = placement.place(manifest, settings, length, _plan_memory(manifest, settings, length).slots)
    tokenizer = Tokenizer(settings.model_dir / manifests.TOKENIZER_FILE, manifest.special_tokens, manifest.vocab_size)
    model = Model(
        settings.model_dir,
        manifest,
        slots=slots,
        context_length=length,
        threads=settings.threads,
        batch_invariant=settings.batch_invariant,
        device=device,
    )
    scheduler = Scheduler(KVCache(slots), settings.prompt_chunk)
    engine = Engine(
        model,
        tokenizer,
        scheduler,
        max_waiting=settings.max_waiting,
        send_timeout=settings.send_timeout_seconds,
        max_queue_seconds=settings.max_queue_seconds,
    )
    return ServedModel(manifest, tokenizer, engine, Limits(length, settings.max_stops))


def context_length(manifest: manifests.Manifest, settings: Settings) -> int:
    """The most tokens of a sequence. Raises StartupError when it is set to more than the model can."""
    length = settings.context_length or manifest.context_length
    if length > manifest.context_length:
        raise StartupError(f"context_length {length} is above the {manifest.context_length} of {settings.model_dir}")
    return length


def check_host(settings: Settings, keys: KeyRing) -> None:
    """Raises StartupError when others than this machine could call without a key."""
    if keys.open and not settings.host.is_loopback:
        raise StartupError(
            f"host {settings.host} is not loopback: listening there needs an API key file (--api-keys-file)"
        )


def _plan_memory(manifest: manifests.Manifest, settings: Settings, context_length: int) -> memory.Plan:
    """The memory's plan, also in the log."""
    budget = memory.budget(settings)
    plan = memory.plan(manifest, settings, context_length, budget)
    fields = {"slots": plan.slots, "max_running": settings.max_running, "budget_mib": budget // memory.MIB}
    sizes = ("total", "weights", "kv_slot", "logits", "other")
    fields |= {f"{name}_mib": memory.mib(getattr(plan, name)) for name in sizes}
    if plan.slots < settings.max_running:
        _log.warning("the memory budget holds fewer slots than max_running", extra={"fields": fields})
    else:
        _log.info("the memory budget holds all slots", extra={"fields": fields})
    return plan


def _tracing(endpoint: str | None) -> Tracing | None:
    """Traces to this collector. Raises StartupError where OpenTelemetry is not installed."""
    if endpoint is None:
        return None
    try:
        from service.tracing import Tracing  # noqa: PLC0415, an extra that most do without
    except ImportError as error:
        message = f"otlp_endpoint needs OpenTelemetry ({error.name} is missing): pip install 'completion-service[otel]'"
        raise StartupError(message) from None
    return Tracing(endpoint)


def _warm_up_request(model: ServedModel, prompt_chunk: int) -> Request:
    """A whole chunk of a prompt and a few tokens after it, for nobody."""
    length = min(prompt_chunk, model.limits.context_length - _WARM_UP_TOKENS)
    token = model.manifest.special_tokens.default_prompt or 0  # any will do
    prompt = Prompt((token,) * length, "", implied=length)
    return Request(
        id="warm-up",
        model=model.manifest.id,
        created=0,
        identity="warm-up",
        prompts=(prompt,),
        max_tokens=_WARM_UP_TOKENS,
        n=1,
        best_of=1,
        stream=False,
        include_usage=False,
        continuous_usage=False,
        logprobs=None,
        echo=False,
        stop=(),
        stop_token_ids=frozenset(),
        min_tokens=0,
        sampling=SamplingParams(temperature=0),
    )


class _Health(health.aio.HealthServicer):  # type: ignore[misc]
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


class Server:
    """The running service. As an async context manager it serves inside the block and drains at its end."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self.keys = KeyRing.load(settings.api_keys_file)
        check_host(settings, self.keys)
        self.model = load_model(settings)
        self._tokenizing = ThreadPoolExecutor(2, thread_name_prefix="tokenizing")
        self._health = _Health()
        self._metrics = self._make_metrics()
        self._exporter: Exporter | None = None
        self._tracing = _tracing(settings.otlp_endpoint)
        observers = [each for each in (self._metrics, self._tracing) if each is not None]
        self._server = grpc.aio.server(
            interceptors=[CallInterceptor(self.keys, *observers)],
            options=self._options(),
            maximum_concurrent_rpcs=_MAX_CALLS,
        )
        self._credentials = tls.credentials(settings)
        self._add_services()

    def _make_metrics(self) -> Metrics | None:
        if not self._settings.metrics_port:
            return None
        engine = self.model.engine

        def read() -> Reading:
            stats, reuse, faults = engine.stats, engine.reuse, engine.faults
            return Reading(
                running=stats.running,
                waiting=stats.waiting,
                slots=engine.slots,
                looked_up_tokens=reuse.prompt_tokens,
                cached_tokens=reuse.cached_tokens,
                failed_steps=faults.failed_steps,
                not_finite=faults.not_finite,
                slow_readers=faults.slow_readers,
            )

        return Metrics(read, self.model.manifest.id if self._settings.vllm_metric_names else None)

    def _options(self) -> list[tuple[str, int]]:
        return [
            ("grpc.so_reuseport", 0),
            ("grpc.max_receive_message_length", self._settings.max_message_bytes),
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
        models = dict.fromkeys(self.model.names, self.model)
        quota = Quota(self._settings.tokens_per_minute, self._settings.max_sequences)
        completion_pb2_grpc.add_CompletionServiceServicer_to_server(
            CompletionServicer(models, self._tokenizing, quota), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    @property
    def address(self) -> str:
        """Where the service listens, as host:port."""
        host = self._settings.host
        return f"[{host}]:{self._settings.port}" if host.version == 6 else f"{host}:{self._settings.port}"

    async def __aenter__(self) -> Server:
        self._bind()
        self._export_metrics()
        self.model.engine.start(asyncio.get_running_loop())
        await self._set_health(False, *_READINESS, _STARTUP)
        await self._set_health(True, _LIVENESS)
        await self._server.start()
        await self._warm_up()
        await self._set_health(True, *_READINESS, _STARTUP)
        _log.info("serving", extra={"fields": {"address": self.address, "model": self.model.manifest.id}})
        if self.keys.open:
            _log.warning("no API key file: any key is taken, and only loopback is listened on")
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.announce_end()
        died = self.model.engine.died.is_set()
        if died:
            await self._set_health(False, _LIVENESS)
        await self._stop(0.0 if died else self._settings.drain_seconds)

    async def _stop(self, seconds: float) -> None:
        """Ends everything; what runs has so many seconds to finish."""
        # No new calls from here on. Those that outlast the drain hear why from the engine, before gRPC cuts them off.
        engine = self.model.engine
        stopped = asyncio.ensure_future(self._server.stop(seconds + _LAST_WORDS_SECONDS))
        asyncio.get_running_loop().call_later(_LAST_WORDS_SECONDS / 4, self._health.end_watches)
        await asyncio.wait([stopped], timeout=seconds)
        await asyncio.to_thread(engine.stop)
        await stopped
        self._tokenizing.shutdown()
        if self._exporter is not None:
            await asyncio.to_thread(self._exporter.close)
        if self._tracing is not None:
            await asyncio.to_thread(self._tracing.close)
        fields = {**dataclasses.asdict(engine.reuse), **dataclasses.asdict(engine.faults)}
        _log.info("stopped", extra={"fields": fields})

    def _bind(self) -> None:
        try:
            if self._credentials is None:
                self._server.add_insecure_port(self.address)
            else:
                self._server.add_secure_port(self.address, self._credentials)
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
            self._exporter = Exporter(self._metrics, host, port)
        except OSError as error:
            message = f"cannot serve metrics on {host} port {port}: {error.strerror}"
            if "metrics_port" in self._settings.model_fields_set:
                raise StartupError(f"{message}; choose another port (--metrics-port), or 0 for none") from None
            _log.warning("%s; there are none", message)

    async def _warm_up(self) -> None:
        """Answers a request of its own: only then is the service ready."""
        engine = self.model.engine
        try:
            await engine.warm_up(_warm_up_request(self.model, self._settings.prompt_chunk))
        except (EngineFaultError, UnavailableError):
            await self._stop(0)
            raise StartupError("the model cannot answer: the warm-up request failed; the log says of what") from None
        engine.observer = self._metrics or Observer()

    async def announce_end(self) -> None:
        """Has health say NOT_SERVING, so that who asks sends no new requests; they are still taken."""
        await self._set_health(False, *_READINESS)

    async def end_if_hung(self) -> None:
        """Watches the engine. When a step never ends, every caller hears of it, and the process exits with 1."""
        engine, seconds = self.model.engine, self._settings.watchdog_seconds
        await watchdog.hung(lambda: engine.turn, seconds)
        _log.critical("the engine hangs", extra={"fields": {"seconds": seconds, **dataclasses.asdict(engine.stats)}})
        await self._set_health(False, *_READINESS, _LIVENESS)
        engine.abandon()
        faulthandler.dump_traceback(all_threads=True)
        await asyncio.sleep(_LAST_WORDS_SECONDS)
        logging.shutdown()
        os._exit(1)

    async def _set_health(self, serving: bool, *names: str) -> None:
        answers = health_pb2.HealthCheckResponse
        for name in names:
            await self._health.set(name, answers.SERVING if serving else answers.NOT_SERVING)


async def serve(settings: Settings) -> None:
    """Serves until SIGTERM or SIGINT, then lets running requests finish; a second signal ends the process at once.

    Raises EngineDiedError when there is no engine to serve with any more: a supervisor should start the process again.
    """
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in _SIGNALS:
        loop.add_signal_handler(number, stop.set)
    server = Server(settings)
    loop.add_signal_handler(signal.SIGHUP, server.keys.reload)
    engine = server.model.engine
    watching = asyncio.ensure_future(server.end_if_hung())
    async with server:
        await _first(stop, engine.died)
        for number in _SIGNALS:
            loop.add_signal_handler(number, os._exit, 128 + number)
        _log.info("draining", extra={"fields": dataclasses.asdict(engine.stats)})
        await server.announce_end()
        await _first(engine.died, within=settings.drain_delay_seconds)
    watching.cancel()
    if engine.died.is_set():
        raise EngineDiedError("the engine has died; the log says of what")


async def _first(*events: asyncio.Event, within: float | None = None) -> None:
    """Waits until one of the events is set, or for so many seconds."""
    waits = [asyncio.ensure_future(event.wait()) for event in events]
    await asyncio.wait(waits, timeout=within, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()

"""Checks whether the service could start with the given settings, without starting it. Each check gives one line."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from service.engine.ort.availability import provider
from service.errors import StartupError
from service.host import kernels, ports
from service.host.processor import processor
from service.rpc import tls
from service.rpc.keys import KeyRing
from service.server import check_host, check_tracing
from service.serving import gpu_memory, memory, models
from service.serving.models import ReadModel
from service.settings import ModelSettings, Settings


@dataclass(frozen=True, slots=True)
class Finding:
    """The result of one check; `text` says what was found, or what is wrong and how to change it."""

    name: str
    passed: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'}  {self.name:<14}{self.text}"


def examine(settings: Settings) -> Iterator[Finding]:
    """Checks everything that a start needs. A check that fails does not end the others, unless they depend on it."""
    checks: dict[str, Callable[[Settings], str]] = {
        "port": lambda settings: _free(str(settings.host), settings.port, "--port"),
        "metrics port": _metrics_port,
        "API keys": _keys,
        "TLS": _tls,
        "traces": _traces,
        "processor": lambda _: str(processor()),
        "kernels": lambda _: kernels.description(),
    }
    for name, check in checks.items():
        yield _finding(name, check, settings)
    configured = settings.configured_models()
    for device, index in dict.fromkeys((model.settings.device, model.settings.device_id) for model in configured):
        yield _finding("provider", provider, device, index)
    found: list[ReadModel] = []
    for model in configured:
        yield _finding("model", _model, model, found)
    if len(found) < len(configured):
        yield from (Finding(name, False, "not checked, because a model failed") for name in ("names", "memory"))
        return
    yield _finding("names", _names, found, settings)
    yield from _memory(found, settings)


def _finding(name: str, check: Callable[..., str], *arguments: object) -> Finding:
    try:
        return Finding(name, True, check(*arguments))
    except StartupError as error:
        return Finding(name, False, str(error))


def _metrics_port(settings: Settings) -> str:
    if not settings.metrics_port:
        return "0: metrics are off"
    try:
        return _free(str(settings.metrics_host), settings.metrics_port, "--metrics-port")
    except StartupError as error:
        if "metrics_port" in settings.model_fields_set:
            raise
        return f"{error}; the service starts without metrics"


def _free(host: str, port: int, flag: str) -> str:
    """Raises StartupError when the service could not listen on this host and port."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        socket.create_server((host, port), family=family).close()
    except OSError as error:
        pid = ports.listener(port)
        why = error.strerror if pid is None else f"in use (pid {pid})"
        raise StartupError(f"{host} port {port}: {why}; choose another ({flag})") from None
    return f"{host} port {port} is free"


def _keys(settings: Settings) -> str:
    keys = KeyRing.load(settings.api_keys_file)
    check_host(settings, keys)
    if keys.open:
        return "no key file: callers need no key, and the service listens on loopback only"
    return f"{settings.api_keys_file}: {len(keys)} keys"


def _tls(settings: Settings) -> str:
    loaded = tls.load(settings)
    if loaded is None:
        return "off"
    assert settings.tls_certificate is not None  # tls.load raises without it
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except ssl.SSLError as error:
        message = f"{settings.tls_certificate} and {settings.tls_key} do not belong together or are damaged"
        raise StartupError(f"{message}: {error.reason}") from None
    callers = (
        "callers need none"
        if settings.tls_client_ca is None
        else f"callers need one issued by {settings.tls_client_ca}"
    )
    until = datetime.fromtimestamp(loaded.expires, UTC)
    return f"{settings.tls_certificate}, which expires {until:%Y-%m-%d %H:%M} UTC; {callers}"


def _traces(settings: Settings) -> str:
    check_tracing(settings.otlp_endpoint)
    return f"sent to {settings.otlp_endpoint}" if settings.otlp_endpoint else "off"


def _model(configured: ModelSettings, found: list[ReadModel]) -> str:
    """Appends a model that passes to `found`."""
    model = models.read(configured)
    models.check_parsed_files(model)
    with models.weights_checked([model]):
        pass
    found.append(model)
    manifest = model.manifest
    return (
        f"{manifest.id} in {model.directory}: the hashes of {len(manifest.files)} files match; {manifest.computed_by}"
    )


def _names(found: list[ReadModel], settings: Settings) -> str:
    return "; ".join(" = ".join((name, *names)) for name, names in models.aliases(found, settings.alias).items())


def _memory(found: list[ReadModel], settings: Settings) -> Iterator[Finding]:
    """One finding per model, or a single one when the memory cannot be divided."""
    try:
        planned = models.divide_memory(models.choose_devices(found), settings)
        texts = [_positions(model) for model in planned]
    except StartupError as error:
        yield Finding("memory", False, str(error))
        return
    for model, text in zip(found, texts, strict=True):
        yield Finding("memory", True, text if len(found) == 1 else f"{model.manifest.id}: {text}")


def _positions(planned: models.PlannedModel) -> str:
    model, plan = planned.read, planned.plan
    _, slots, length = gpu_memory.place(model.manifest, model.settings, plan)
    own = model.manifest.context_length
    context = f"max_model_len {length}" + (f" of the model's {own}" if length < own else "")
    return (
        f"{plan.positions} positions in {slots} slots: {plan.typical_requests} requests of {memory.TYPICAL} tokens at"
        f" once; {context}; {memory.mib(plan.weights)} MiB of weights and {memory.mib(plan.kv)} of KV cache,"
        f" {memory.mib(plan.total)} of {memory.mib(planned.allowed)} MiB in all"
    )

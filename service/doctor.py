"""What keeps a service with these settings from starting, found without starting it: one line per thing looked at."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime

from service.engine.ort.device import provider
from service.errors import StartupError
from service.host import ports
from service.host.processor import processor
from service.rpc import tls
from service.rpc.keys import KeyRing
from service.server import check_host, check_tracing
from service.serving import gpu_memory, memory, models
from service.serving.models import Checked
from service.settings import ModelSettings, Settings


@dataclass(frozen=True, slots=True)
class Finding:
    """What was looked at, whether it will do, and what was found."""

    name: str
    good: bool
    text: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.good else 'FAIL'}  {self.name:<14}{self.text}"


def examine(settings: Settings) -> Iterator[Finding]:
    """Looks at everything that a start needs, whatever the others show."""
    checks: dict[str, Callable[[Settings], str]] = {
        "port": _port,
        "metrics port": _metrics_port,
        "API keys": _keys,
        "TLS": _tls,
        "traces": _traces,
        "processor": lambda _: str(processor()),
    }
    for name, check in checks.items():
        yield _finding(name, check, settings)
    devices = ((each.settings.device, each.settings.device_id) for each in settings.each_model())
    for device, index in dict.fromkeys(devices):
        yield _finding("provider", provider, device, index)
    checked: list[Checked] = []
    for given in settings.each_model():
        yield _finding("model", _model, given, checked)
    if len(checked) < len(settings.each_model()):
        yield from (Finding(name, False, "not known before all models are sound") for name in ("names", "memory"))
        return
    yield _finding("names", _names, checked, settings)
    yield from _memory(checked, settings)


def _finding(name: str, check: Callable[..., str], *arguments: object) -> Finding:
    try:
        return Finding(name, True, check(*arguments))
    except StartupError as error:
        return Finding(name, False, str(error))


def _port(settings: Settings) -> str:
    return _free(str(settings.host), settings.port, "--port")


def _metrics_port(settings: Settings) -> str:
    if not settings.metrics_port:
        return "0: there are no metrics"
    try:
        return _free(str(settings.metrics_host), settings.metrics_port, "--metrics-port")
    except StartupError as error:
        if "metrics_port" in settings.model_fields_set:
            raise
        return f"{error}; the service starts without metrics"


def _free(host: str, port: int, flag: str) -> str:
    """Raises StartupError when nobody can listen there."""
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
        return "no key file: no key is asked for, on loopback alone"
    return f"{settings.api_keys_file}: {len(keys)} keys"


def _tls(settings: Settings) -> str:
    loaded = tls.load(settings)
    if loaded is None:
        return "off"
    assert settings.tls_certificate is not None  # else `load` has raised
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except ssl.SSLError as error:
        message = f"{settings.tls_certificate} and {settings.tls_key} do not belong together or are damaged"
        raise StartupError(f"{message}: {error.reason}") from None
    callers = "callers need none" if settings.tls_client_ca is None else f"callers' from {settings.tls_client_ca}"
    until = datetime.fromtimestamp(loaded.expires, UTC)
    return f"{settings.tls_certificate}, which expires {until:%Y-%m-%d %H:%M} UTC; {callers}"


def _traces(settings: Settings) -> str:
    check_tracing(settings.otlp_endpoint)
    return f"sent to {settings.otlp_endpoint}" if settings.otlp_endpoint else "off"


def _model(given: ModelSettings, checked: list[Checked]) -> str:
    """Adds a sound model to `checked`."""
    model = models.check(given)
    checked.append(model)
    files = len(model.manifest.files)
    return f"{model.manifest.id} in {given.directory}: the hashes of {files} files are right"


def _names(checked: list[Checked], settings: Settings) -> str:
    found = zip(checked, models.aliases(checked, settings.alias), strict=True)
    return "; ".join(" = ".join((model.manifest.id, *names)) for model, names in found)


def _memory(checked: list[Checked], settings: Settings) -> Iterator[Finding]:
    """A finding for each model, or one for all when the budget cannot be divided."""
    try:
        settled = models.settle(checked)
        plans = models.plans(settled, settings)
        placed = [
            gpu_memory.place(model.manifest, model.given.settings, model.context_length, plan.slots)
            for model, (_, plan) in zip(settled, plans, strict=True)
        ]
    except StartupError as error:
        yield Finding("memory", False, str(error))
        return
    for model, (part, plan), (_, slots) in zip(settled, plans, placed, strict=True):
        most = model.given.settings.max_running
        found = f"{slots} of {most} slots, {memory.mib(plan.total)} of {part // memory.MIB} MiB"
        found += "" if slots == most else ": fewer run at once than max_running"
        yield Finding("memory", True, found if len(checked) == 1 else f"{model.manifest.id}: {found}")

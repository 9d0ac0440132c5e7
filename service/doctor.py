"""What keeps a service with these settings from starting, found without starting it: one line per thing looked at."""

from __future__ import annotations

import socket
import ssl
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from service import manifest as manifests
from service import memory, placement, ports
from service.engine.device import provider
from service.errors import StartupError
from service.rpc import tls
from service.rpc.keys import KeyRing
from service.server import check_host, context_length
from service.settings import Settings


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
        "provider": lambda settings: provider(settings.device, settings.device_id),
        "model": _model,
        "memory": _memory,
    }
    for name, check in checks.items():
        try:
            yield Finding(name, True, check(settings))
        except StartupError as error:
            yield Finding(name, False, str(error))


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
        return "no key file: any key is taken, on loopback alone"
    return f"{settings.api_keys_file}: {len(keys)} keys"


def _tls(settings: Settings) -> str:
    if tls.credentials(settings) is None:
        return "off"
    assert settings.tls_certificate is not None  # else `credentials` has raised
    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(settings.tls_certificate, settings.tls_key)
    except ssl.SSLError as error:
        message = f"{settings.tls_certificate} and {settings.tls_key} do not belong together or are damaged"
        raise StartupError(f"{message}: {error.reason}") from None
    callers = "callers need none" if settings.tls_client_ca is None else f"callers' from {settings.tls_client_ca}"
    return f"{settings.tls_certificate}; {callers}"


def _model(settings: Settings) -> str:
    manifest = manifests.load(settings.model_dir)
    manifests.check_external_data(settings.model_dir, manifest)
    return f"{manifest.id} in {settings.model_dir}: the hashes of {len(manifest.files)} files are right"


def _memory(settings: Settings) -> str:
    manifest = manifests.load(settings.model_dir)
    settings = placement.settled(manifest, settings)
    budget = memory.budget(settings)
    plan = memory.plan(manifest, settings, context_length(manifest, settings), budget)
    _, slots = placement.place(manifest, settings, context_length(manifest, settings), plan.slots)
    found = f"{slots} of {settings.max_running} slots, {memory.mib(plan.total)} of {budget // memory.MIB} MiB"
    return found if slots == settings.max_running else f"{found}: fewer run at once than max_running"

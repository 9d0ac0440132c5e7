"""Envoy's configuration for this machine: envoy/envoy.yaml on loopback, with chosen ports, replicas and TLS.

It reads no environment variables: see `Options` in deploy/local.py.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
ENVOY_CONFIG = ROOT / "envoy" / "envoy.yaml"
# The place of the longest request in envoy.yaml.
LONGEST_REQUEST_ANCHOR = "&longest_request 600s"


def envoy_command(
    binary: str,
    ports: dict[str, int],
    folder: Path,
    replicas: Sequence[int] = (),
    affinity: bool = False,
    *,
    longest_request: int | None = None,
    certificates: Path | None = None,
) -> list[str]:
    """The command that runs Envoy on the chosen ports; its configuration is written into `folder`.

    `replicas` and `affinity` are those of `envoy_config`, `longest_request` that of `template`. With `certificates`,
    a folder, Envoy uses TLS.
    """
    text = envoy_config(ports, replicas, affinity, longest_request)
    if certificates:
        text = with_tls(text, certificates, folder)
    config = folder / "envoy.yaml"
    config.write_text(text)
    # Without the flush interval a line of the access log may take ten seconds to reach the file.
    return [binary, "-c", str(config), "--disable-hot-restart", "-l", "warn", "--file-flush-interval-msec", "1000"]


def template(longest_request: int | None = None) -> str:
    """envoy.yaml; `longest_request` replaces its longest time of a request, in seconds."""
    text = ENVOY_CONFIG.read_text()
    assert text.count(LONGEST_REQUEST_ANCHOR) == 1
    if longest_request is None:
        return text
    return text.replace(LONGEST_REQUEST_ANCHOR, LONGEST_REQUEST_ANCHOR.replace("600", str(longest_request)))


def envoy_config(
    ports: dict[str, int], replicas: Sequence[int] = (), affinity: bool = False, longest_request: int | None = None
) -> str:
    """envoy.yaml on loopback, with the chosen ports.

    `replicas` are the gRPC ports of further service processes; with `affinity` each session keeps to one of them all.
    """
    config = yaml.safe_load(template(longest_request))
    resources = config["static_resources"]
    listen_on(resources["listeners"][0], ports["HTTP_PORT"])
    hosts: list[dict[str, Any]] = [{"endpoint": {"address": {}}} for _ in range(1 + len(replicas))]
    for host, grpc_port in zip(hosts, (ports["GRPC_PORT"], *replicas), strict=True):
        listen_on(host["endpoint"], grpc_port)
    for cluster in clusters_of_the_service(config):
        cluster["load_assignment"]["endpoints"][0]["lb_endpoints"] = hosts
    if affinity:
        resources["clusters"][0]["lb_policy"] = "RING_HASH"
    open_admin(config, ports)
    return str(yaml.safe_dump(config, sort_keys=False))


def open_admin(config: dict[str, Any], ports: dict[str, int]) -> None:
    """Sets the ports of the admin pages and of the metrics listener, and removes those without an entry in `ports`.

    The pages listen on ADMIN_PORT and the metrics on ENVOY_METRICS_PORT; without its port each is removed.
    """
    resources = config["static_resources"]
    metrics, admin = named(resources["listeners"], "metrics"), named(resources["clusters"], "admin")
    if "ENVOY_METRICS_PORT" in ports:
        listen_on(metrics, ports["ENVOY_METRICS_PORT"])
        ports = {"ADMIN_PORT": free_ports(1)[0], **ports}
        listen_on(admin["load_assignment"]["endpoints"][0]["lb_endpoints"][0]["endpoint"], ports["ADMIN_PORT"])
    else:
        resources["listeners"].remove(metrics)
        resources["clusters"].remove(admin)
    if "ADMIN_PORT" in ports:
        listen_on(config["admin"], ports["ADMIN_PORT"])
    else:
        del config["admin"]


def with_tls(config: str, certificates: Path, secrets: Path) -> str:
    """Envoy's configuration with TLS at its listener and its cluster.

    The files that name the certificates are written into the folder `secrets`.
    """
    changed = yaml.safe_load(config)
    text = (ROOT / "envoy" / "tls.yaml").read_text()
    parts = yaml.safe_load(text.replace("CERTIFICATES", str(certificates)).replace("SECRETS", str(secrets)))
    changed["node"] = parts["node"]
    changed["static_resources"]["listeners"][0]["filter_chains"][0]["transport_socket"] = parts["door"]
    for cluster in clusters_of_the_service(changed):
        cluster["transport_socket"] = parts["service"]
    for name, secret in parts["secrets"].items():
        resource = {"@type": "type.googleapis.com/envoy.extensions.transport_sockets.tls.v3.Secret", "name": name}
        (secrets / f"{name}.yaml").write_text(yaml.safe_dump({"resources": [resource | secret]}, sort_keys=False))
    return str(yaml.safe_dump(changed, sort_keys=False))


def clusters_of_the_service(config: dict[str, Any]) -> list[dict[str, Any]]:
    """All clusters but that of Envoy's own admin pages."""
    return [cluster for cluster in config["static_resources"]["clusters"] if cluster["name"] != "admin"]


def named(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The one listener or cluster of this name."""
    (item,) = [item for item in items if item["name"] == name]
    return item


def listen_on(owner: dict[str, Any], port: int) -> None:
    """Sets the address of a listener, an endpoint or the admin pages to `port` on loopback."""
    owner["address"]["socket_address"] = {"address": "127.0.0.1", "port_value": port}


def free_ports(count: int) -> list[int]:
    """Distinct ports of 127.0.0.1 that nothing listens on."""
    sockets = [socket.socket() for _ in range(count)]
    try:
        for item in sockets:
            item.bind(("127.0.0.1", 0))
        return [item.getsockname()[1] for item in sockets]
    finally:
        for item in sockets:
            item.close()

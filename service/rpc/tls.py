"""TLS for the gRPC port: the service's certificate, and the authority that callers' certificates must come from."""

from __future__ import annotations

from pathlib import Path

import grpc

from service.errors import StartupError
from service.settings import Settings


def credentials(settings: Settings) -> grpc.ServerCredentials | None:
    """What the settings say of TLS; None where they say nothing. Raises StartupError."""
    certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise StartupError("TLS needs both --tls-certificate and --tls-key; --tls-client-ca is only for use with them")
    pair = (_pem(key, "PRIVATE KEY"), _pem(certificate, "CERTIFICATE"))
    if client_ca is None:
        return grpc.ssl_server_credentials([pair])
    return grpc.ssl_server_credentials([pair], _pem(client_ca, "CERTIFICATE"), require_client_auth=True)


def _pem(path: Path, kind: str) -> bytes:
    """The content of a PEM file that holds at least one block of a kind."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartupError(f"TLS file {path} cannot be read: {error.strerror}") from None
    if f"{kind}-----".encode() not in content:
        raise StartupError(f"TLS file {path} holds no {kind.lower()} in PEM format")
    return content

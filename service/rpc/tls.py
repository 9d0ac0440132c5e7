"""TLS for the gRPC port: the service's certificate, and the authority that callers' certificates must come from."""

from __future__ import annotations

import ssl
import threading
from pathlib import Path
from typing import Any

import grpc
from cryptography import x509

from service.errors import StartupError
from service.settings import Settings
from service.telemetry.log import get_logger

_log = get_logger(__name__)

# Device, inode, size and time of the last change of each file: equal stamps mean the same contents.
Stamp = tuple[tuple[int, int, int, int], ...]


def load(settings: Settings) -> Rotation | None:
    """The certificates that the settings name; None if they name none. Raises StartupError."""
    certificate, key, client_ca = settings.tls_certificate, settings.tls_key, settings.tls_client_ca
    if certificate is None and key is None and client_ca is None:
        return None
    if certificate is None or key is None:
        raise StartupError("TLS needs both --tls-certificate and --tls-key; --tls-client-ca is only for use with them")
    return Rotation(certificate, key, client_ca)


class Rotation:
    """Checks the files at each new connection; invalid ones change nothing, and are logged once.

    `client_ca` is the file of the authority of callers' certificates. New connections use whatever certificate is in
    the files now; open ones keep theirs. `expires` is when the first certificate of the current chain expires, in Unix
    seconds.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._lock = threading.Lock()
        self._first, self.expires = self._read()
        self._stamp: Stamp | None = self._stamp_now()

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials to open a port with."""
        # The stubs do not know that None means no change.
        fetch: Any = self.fetch
        return grpc.dynamic_ssl_server_credentials(self._first, fetch, self._client_ca is not None)

    def fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """The new configuration, or None if the current one stays. gRPC calls it on its own threads."""
        with self._lock:
            stamp = None
            try:
                stamp = self._stamp_now()
                if stamp == self._stamp:
                    return None
                loaded, self.expires = self._read()
            except (OSError, StartupError) as error:
                if stamp != self._stamp:
                    _log.warning("the TLS files are not valid, and the old ones stay", error=str(error))
                loaded = None
            else:
                _log.info("the TLS files have changed: new connections get the new certificate")
            self._stamp = stamp
            return loaded

    def _stamp_now(self) -> Stamp:
        """Identifies the files' contents without reading them. Raises OSError."""
        stats = (path.stat() for path in (self._certificate, self._key, self._client_ca) if path is not None)
        return tuple((stat.st_dev, stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)

    def _read(self) -> tuple[grpc.ServerCertificateConfiguration, float]:
        """Reads the files, checks that they belong together, and finds when they expire. Raises StartupError."""
        pair = (_pem(self._key, "PRIVATE KEY"), _pem(self._certificate, "CERTIFICATE"))
        authority = None if self._client_ca is None else _pem(self._client_ca, "CERTIFICATE")
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            # An empty password from `str()`: a key that needs one is refused, not asked for at the terminal.
            context.load_cert_chain(self._certificate, self._key, password=str)
            if authority is not None:
                context.load_verify_locations(cadata=authority.decode())
        except (OSError, ValueError) as error:
            raise StartupError(f"TLS files {self._certificate} and {self._key} cannot be used: {error}") from None
        try:
            chain = x509.load_pem_x509_certificates(pair[1])
        except ValueError as error:
            raise StartupError(f"TLS file {self._certificate} cannot be read: {error}") from None
        expires = min(certificate.not_valid_after_utc for certificate in chain).timestamp()
        return grpc.ssl_server_certificate_configuration([pair], authority), expires


def _pem(path: Path, label: str) -> bytes:
    """The content of a PEM file that has at least one block with this label."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise StartupError(f"TLS file {path} cannot be read: {error.strerror}") from None
    if f"{label}-----".encode() not in content:
        raise StartupError(f"TLS file {path} holds no {label.lower()} in PEM format")
    return content

"""Who calls: API keys, known by their SHA-256 alone and compared in constant time, and names for the log."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from service.errors import AuthenticationError, StartupError

_LINE = re.compile(r"^(?P<digest>[0-9a-f]{64})\s+(?P<name>[A-Za-z0-9_.-]{1,64})$")
_BEARER = re.compile(r"^Bearer +(?P<key>[\x21-\x7e]+)$", re.IGNORECASE)


_PSEUDONYM_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: `name` is safe to log, `identity` keeps callers' caches apart."""

    name: str
    identity: str


class KeyRing:
    """The keys that open the service: `keys` maps their SHA-256 to the caller's name; None takes any key."""

    def __init__(self, keys: dict[bytes, str] | None) -> None:
        self._keys = keys

    @property
    def open(self) -> bool:
        """Whether any key will do."""
        return self._keys is None

    @classmethod
    def load(cls, path: Path | None) -> KeyRing:
        """Reads a key file: a SHA-256 in hex and a name per line; empty lines and `#` comments are skipped."""
        if path is None:
            return cls(None)
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise StartupError(f"API key file {path} cannot be read: {error}") from error
        keys = {}
        for number, line in enumerate(text.splitlines(), 1):
            entry = line.strip()
            if not entry or entry.startswith("#"):
                continue
            match = _LINE.match(entry)
            if match is None:
                raise StartupError(f"API key file {path}, line {number}: expected '<64 hex digits> <name>'")
            keys[bytes.fromhex(match["digest"])] = match["name"]
        if not keys:
            raise StartupError(f"API key file {path} holds no key")
        return cls(keys)

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller that an `authorization` header names; AuthenticationError when it names none."""
        match = _BEARER.match(authorization or "")
        if match is None:
            message = (
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            raise AuthenticationError(message, code="invalid_api_key")
        digest = hashlib.sha256(match["key"].encode()).digest()
        if self._keys is None:
            return Caller("anonymous", digest.hex())
        name = None
        for known, owner in self._keys.items():
            if hmac.compare_digest(known, digest):
                name = owner
        if name is None:
            raise AuthenticationError("Incorrect API key provided.", code="invalid_api_key")
        return Caller(name, digest.hex())


def pseudonym(user: str) -> str:
    """What the log calls an end user: the same within one process, and nothing to look a name up by."""
    return hashlib.blake2b(user.encode(), key=_PSEUDONYM_KEY, digest_size=8).hexdigest()

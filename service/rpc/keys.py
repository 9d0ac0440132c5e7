"""Who calls: API keys, known by their SHA-256 alone and compared in constant time, and names for the log."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass
from pathlib import Path

from service.errors import AuthenticationError, StartupError

_LINE = re.compile(r"^(?P<digest>[0-9a-f]{64})\s+(?P<name>[A-Za-z0-9_.-]{1,64})(\s+models=(?P<models>\S+))?$")
_EXPECTED = "'<64 hex digits> <name>', and perhaps 'models=<id>,<id>'"
_BEARER = re.compile(r"^Bearer +(?P<key>[\x21-\x7e]+)$", re.IGNORECASE)


_PSEUDONYM_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: `name` is safe to log, `identity` keeps callers' caches apart, None as `models` allows all of them."""

    name: str
    identity: str
    models: frozenset[str] | None = None

    def may_use(self, *names: str) -> bool:
        """Whether the caller may use the model that has these names."""
        return self.models is None or not self.models.isdisjoint(names)


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """Whose a key is, and which models it may use: by id or alias, None for all."""

    name: str
    models: frozenset[str] | None


class KeyRing:
    """The keys that open the service: `keys` maps their SHA-256 to whose they are; None takes any key."""

    def __init__(self, keys: dict[bytes, KeyHolder] | None) -> None:
        self._keys = keys

    @property
    def open(self) -> bool:
        """Whether any key will do."""
        return self._keys is None

    @classmethod
    def load(cls, path: Path | None) -> KeyRing:
        """Reads a key file: per line a SHA-256 in hex, a name, and perhaps `models=` with ids or aliases.

        Empty lines and `#` comments are skipped.
        """
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
                raise StartupError(f"API key file {path}, line {number}: expected {_EXPECTED}")
            models = frozenset(match["models"].split(",")) if match["models"] else None
            keys[bytes.fromhex(match["digest"])] = KeyHolder(match["name"], models)
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
        holder = None
        for known, owner in self._keys.items():
            if hmac.compare_digest(known, digest):
                holder = owner
        if holder is None:
            raise AuthenticationError("Incorrect API key provided.", code="invalid_api_key")
        return Caller(holder.name, digest.hex(), holder.models)


def pseudonym(user: str) -> str:
    """What the log calls an end user: the same within one process, and nothing to look a name up by."""
    return hashlib.blake2b(user.encode(), key=_PSEUDONYM_KEY, digest_size=8).hexdigest()

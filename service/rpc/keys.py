"""Who calls: API keys, known by their SHA-256 alone and compared in constant time, and names for the log."""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from service import telemetry
from service.errors import AuthenticationError, StartupError
from service.rpc.quota import UNLIMITED, Quota

_log = telemetry.get_logger(__name__)

_LINE = re.compile(
    r"^(?P<digest>[0-9a-f]{64})\s+(?P<name>[A-Za-z0-9_.-]{1,64})"
    r"(?P<options>(\s+(models=\S+|(tokens_per_minute|max_sequences)=[1-9][0-9]{0,11}))*)$"
)
_EXPECTED = (
    "'<64 hex digits> <name>', and after it at most 'models=<id>,<id>', 'tokens_per_minute=<number>' and "
    "'max_sequences=<number>'"
)
_BEARER = re.compile(r"^Bearer +(?P<key>[\x21-\x7e]+)$", re.IGNORECASE)
# A key was given, though in no way that names one: in other characters, or twice.
_ODD_BEARER = re.compile(r"(^|,) *Bearer +\S", re.IGNORECASE)

_LOOK_SECONDS = 1.0
_PSEUDONYM_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Caller:
    """Who calls: `name` is safe to log, `identity` keeps callers' caches apart.

    `models` are what the key may use, by id or alias, None for all; `quota` are its own limits.
    """

    name: str
    identity: str
    models: frozenset[str] | None = None
    quota: Quota = UNLIMITED

    def may_use(self, *names: str) -> bool:
        """Whether the caller may use the model that has these names."""
        return self.models is None or not self.models.isdisjoint(names)


class KeyRing:
    """The keys that open the service: `keys` maps their SHA-256 to the caller; None needs no key, and takes any.

    Keys from a file follow it: within a second of a call after it has changed. While the new file is not valid the
    keys stay as they were.
    """

    def __init__(self, keys: Mapping[bytes, Caller] | None, file: Path | None = None) -> None:
        self._keys = keys
        self._file = file
        self._seen = _signature(file)
        self._looked = time.monotonic()

    def __len__(self) -> int:
        return len(self._keys or ())

    @property
    def open(self) -> bool:
        """Whether no key is needed."""
        return self._keys is None

    @classmethod
    def load(cls, path: Path | None) -> KeyRing:
        """Reads a key file: per line a SHA-256 in hex, a name, and perhaps models and limits.

        Empty lines and `#` comments are skipped.
        """
        return cls(None) if path is None else cls(_read(path), path)

    def reload(self) -> None:
        """Reads the file again, if there is one; of one that is not valid the log says why, and nothing changes."""
        if self._file is None:
            return
        self._seen = _signature(self._file)
        try:
            self._keys = _read(self._file)
        except StartupError as error:
            _log.error("the API keys stay as they were", error=str(error))
        else:
            _log.info("API keys read", keys=len(self._keys))

    def _follow(self) -> None:
        """Reloads a file that has changed, looking once a second."""
        now = time.monotonic()
        if self._file is not None and now - self._looked >= _LOOK_SECONDS:
            self._looked = now
            if _signature(self._file) != self._seen:
                self.reload()

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller that an `authorization` header names; AuthenticationError when it names none."""
        match = _BEARER.match(authorization or "")
        if self._keys is None:
            return Caller("anonymous", hashlib.sha256((match["key"] if match else "").encode()).hexdigest())
        if match is None and _ODD_BEARER.search(authorization or ""):
            raise AuthenticationError("Incorrect API key provided.", code="invalid_api_key")
        if match is None:
            message = (
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            raise AuthenticationError(message, code="invalid_api_key")
        self._follow()
        digest = hashlib.sha256(match["key"].encode()).digest()
        caller = None
        for known, owner in self._keys.items():
            if hmac.compare_digest(known, digest):
                caller = owner
        if caller is None:
            raise AuthenticationError("Incorrect API key provided.", code="invalid_api_key")
        return caller


def _read(path: Path) -> dict[bytes, Caller]:
    """The callers of a key file by their keys' digests. Raises StartupError."""
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
        keys[bytes.fromhex(match["digest"])] = _caller(match["name"], match["digest"], match["options"])
    if not keys:
        raise StartupError(f"API key file {path} holds no key")
    return keys


def _caller(name: str, identity: str, options: str) -> Caller:
    given = dict(option.split("=", 1) for option in options.split())
    models = given.pop("models", None)
    quota = Quota(**{limit: int(number) for limit, number in given.items()})
    return Caller(name, identity, None if models is None else frozenset(models.split(",")), quota)


def _signature(path: Path | None) -> tuple[int, ...] | None:
    """What changes with a file's content; None where there is no file."""
    try:
        found = path.stat() if path else None
    except OSError:
        return None
    return (found.st_mtime_ns, found.st_size, found.st_ino) if found else None


def pseudonym(user: str) -> str:
    """What the log calls an end user: the same within one process, and nothing to look a name up by."""
    return hashlib.blake2b(user.encode(), key=_PSEUDONYM_KEY, digest_size=8).hexdigest()

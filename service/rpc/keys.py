"""Callers: API keys, stored only as SHA-256 digests, and callers' names for the log."""

from __future__ import annotations

import hashlib
import os
import re
import secrets
import stat
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from service.errors import AuthenticationError, StartupError
from service.rpc.quota import UNLIMITED, Quota
from service.telemetry.log import get_logger

_log = get_logger(__name__)

_LINE = re.compile(
    r"^(?P<digest>[0-9a-f]{64})\s+(?P<name>[A-Za-z0-9_.-]{1,64})"
    r"(?P<options>(\s+(models=\S+|(requests_per_minute|tokens_per_minute|max_sequences)=[1-9][0-9]{0,11}|"
    r"most_urgent=-?(100|[1-9]?[0-9])))*)$"
)
_EXPECTED = (
    "'<64 hex digits> <name>', and after it at most 'models=<id>,<id>', 'requests_per_minute=<number>', "
    "'tokens_per_minute=<number>', 'max_sequences=<number>' and 'most_urgent=<-100..100>'"
)
# Seconds that a writer of the file may pause between two writes.
_WRITING_SECONDS = 2.0
_PSEUDONYM_KEY = secrets.token_bytes(32)


@dataclass(frozen=True, slots=True)
class Caller:
    """A caller: `name` is safe to log, `identity` keeps callers and their prefix caches apart.

    Keys of one name have one identity. `key` is the SHA-256 of the caller's key, which may use `models`, by id or
    alias; None means all. `quota` holds the key's own limits. Its requests may have no priority below `most_urgent`;
    None means no bound.
    """

    name: str
    identity: str
    key: str
    models: frozenset[str] | None = None
    quota: Quota = UNLIMITED
    most_urgent: int | None = None

    def may_use(self, *names: str) -> bool:
        """Whether the caller may use the model that has these names."""
        return self.models is None or not self.models.isdisjoint(names)


UNAUTHENTICATED = Caller("", "", "", models=frozenset())


class _Stamp(NamedTuple):
    """Identifies a file's contents: its inode, its size in bytes, and the time of the last write, in nanoseconds."""

    inode: int
    size: int
    changed: int


class KeyRing:
    """The accepted keys: `keys` maps their SHA-256 to the caller; with None no key is required.

    `follow` reads a key file again after it has changed. While the new file is not valid, the old keys stay. A key is
    found by its digest in one lookup, however many keys there are; its time can reveal only the digest.
    """

    def __init__(
        self, keys: Mapping[bytes, Caller] | None, file: Path | None = None, seen: _Stamp | None = None
    ) -> None:
        """`seen` identifies the contents of `file` that the keys were read from."""
        self._keys = keys
        self._file = file
        self._seen = seen

    def __len__(self) -> int:
        return len(self._keys or ())

    @property
    def open(self) -> bool:
        """Whether no key is required."""
        return self._keys is None

    @classmethod
    def load(cls, path: Path | None) -> KeyRing:
        """Reads a key file: per line a SHA-256 in hex, a name, and perhaps models and limits.

        Empty lines and `#` comments are skipped. Raises StartupError.
        """
        if path is None:
            return cls(None)
        keys, seen = _read(path)
        return cls(keys, path, seen)

    def follow(self) -> frozenset[str]:
        """Reads a file that has changed; returns the removed keys, by their SHA-256.

        A file that is being written in place is read once nothing has been written to it for two seconds.
        """
        if self._file is None:
            return frozenset()
        stamp = _stamp(self._file)
        if stamp == self._seen or _being_written(stamp, self._seen):
            return frozenset()
        return self.reload()

    def reload(self) -> frozenset[str]:
        """Reads the file, if there is one, whether it has changed or not; the log says why a file is not valid.

        Returns what `follow` does.
        """
        if self._file is None or self._keys is None:
            return frozenset()
        self._seen = _stamp(self._file)
        try:
            keys, self._seen = _read(self._file)
        except StartupError as error:
            _log.error("the API keys stay as they were", error=str(error))
            return frozenset()
        gone = frozenset(self._keys[digest].key for digest in self._keys.keys() - keys.keys())
        self._keys = keys
        _log.info("API keys read", keys=len(keys), revoked=len(gone))
        return gone

    def authenticate(self, authorization: str | None) -> Caller:
        """The caller whose key is in this `authorization` header. Raises AuthenticationError without a valid key."""
        scheme, _, key = (authorization or "").partition(" ")
        token = key.strip(" ") if scheme.lower() == "bearer" else ""
        digest = hashlib.sha256(token.encode("utf-8", "surrogateescape")).digest()
        if self._keys is None:
            return Caller("anonymous", digest.hex(), digest.hex())
        if not token:
            message = (
                "You didn't provide an API key. You need to provide your API key in an Authorization header using "
                "Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
            )
            raise AuthenticationError(message, code="invalid_api_key")
        caller = self._keys.get(digest)
        if caller is None:
            raise AuthenticationError("Incorrect API key provided.", code="invalid_api_key")
        return caller


def _read(path: Path) -> tuple[dict[bytes, Caller], _Stamp]:
    """The callers of a key file by their keys' digests, and the file's stamp. Raises StartupError."""
    text, stamp = _text(path)
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
    return keys, stamp


def _text(path: Path) -> tuple[str, _Stamp]:
    """The text of a regular file, and its stamp. Raises StartupError, also for other files: reading might never end."""
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), encoding="utf-8") as file:  # noqa: PTH123, of a descriptor
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise StartupError(f"API key file {path} cannot be read: it is not a regular file")
            return file.read(), _stamp_of(status)
    except (OSError, UnicodeDecodeError) as error:
        raise StartupError(f"API key file {path} cannot be read: {error}") from error


def _caller(name: str, key: str, options: str) -> Caller:
    values = dict(option.split("=", 1) for option in options.split())
    models, most_urgent = values.pop("models", None), values.pop("most_urgent", None)
    quota = Quota(**{limit: int(number) for limit, number in values.items()})
    return Caller(
        name,
        identity=f"name {name}",
        key=key,
        models=None if models is None else frozenset(models.split(",")),
        quota=quota,
        most_urgent=None if most_urgent is None else int(most_urgent),
    )


def _stamp_of(status: os.stat_result) -> _Stamp:
    return _Stamp(status.st_ino, status.st_size, status.st_mtime_ns)


def _stamp(path: Path) -> _Stamp | None:
    """The file's stamp, which changes with its content; None if there is no file."""
    try:
        return _stamp_of(path.stat())
    except OSError:
        return None


def _being_written(stamp: _Stamp | None, before: _Stamp | None) -> bool:
    """Whether a file was written to in place a moment ago: its writer may not have finished."""
    if stamp is None or before is None or stamp.inode != before.inode:
        return False
    return 0 <= time.time() - stamp.changed / 1e9 < _WRITING_SECONDS


def pseudonym(user: str) -> str:
    """An end user's name for the log: stable within one process, and not traceable to the user."""
    return hashlib.blake2b(user.encode(), key=_PSEUDONYM_KEY, digest_size=8).hexdigest()

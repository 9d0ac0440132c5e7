"""The key-value part of a GGUF file."""

from __future__ import annotations

from typing import Any

from gguf import GGUFReader

from model_export.errors import ExportError


class Metadata:
    """Keys and their values; arrays are lists."""

    def __init__(self, reader: GGUFReader) -> None:
        self._fields = reader.fields
        self._read: dict[str, Any] = {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, or `default` where the file has none."""
        if key not in self._fields:
            return default
        if key not in self._read:
            self._read[key] = self._fields[key].contents()
        return self._read[key]

    def require(self, key: str) -> Any:
        """The value of `key`; raises ExportError where the file has none."""
        if key not in self._fields:
            raise ExportError(f"the GGUF file has no {key}")
        return self.get(key)

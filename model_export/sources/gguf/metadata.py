"""The key-value part of a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from model_export.errors import ExportError


class Metadata(Mapping[str, Any]):
    """Keys and their values; arrays of numbers are numpy arrays, those of texts are lists."""

    def __init__(self, values: Mapping[str, Any]) -> None:
        self._values = values

    def __getitem__(self, key: str) -> Any:
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def plain(self, key: str) -> Any:
        """The value of `key`, an array as a list; None where the file has none."""
        value = self.get(key)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def require(self, key: str) -> Any:
        """The value of `key`; raises ExportError where the file has none."""
        if key not in self._values:
            raise ExportError(f"the GGUF file has no {key}")
        return self._values[key]

"""The keys of a GGUF file and their values."""

from __future__ import annotations

from typing import Any

import numpy as np

from model_export.errors import ExportError


class Metadata(dict[str, Any]):
    """Keys and their values; an array of numbers is a numpy array, an array of texts a list."""

    def plain(self, key: str) -> Any:
        """The value of `key`, an array of numbers as a list; None where the file does not have it."""
        value = self.get(key)
        return value.tolist() if isinstance(value, np.ndarray) else value

    def require(self, key: str) -> Any:
        """The value of `key`. Raises ExportError where the file does not have it."""
        if key not in self:
            raise ExportError(f"the GGUF file has no {key}")
        return self[key]

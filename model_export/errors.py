"""The errors that the exporter reports to its user."""

from __future__ import annotations

from service.quality import Quality


class ExportError(Exception):
    """The source cannot be exported; the message is one sentence that says why."""


class TooFarError(ExportError):
    """The exported model diverges further from its source than allowed.

    `quality` is what was measured where the model could be used all the same, else None.
    """

    def __init__(self, message: str, quality: Quality | None = None) -> None:
        super().__init__(message)
        self.quality = quality

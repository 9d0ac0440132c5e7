"""The errors that the exporter reports to its user."""

from __future__ import annotations


class ExportError(Exception):
    """The source cannot be exported; the message is one sentence that says why."""


class TooFarError(ExportError):
    """The exported model diverges further from its source than allowed."""

"""Failures of the tokenizers library, some of which are panics: no Exceptions, and told on the standard error too."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from model_export.errors import ExportError


@contextmanager
def told_as(message: str) -> Iterator[None]:
    """Raises ExportError, `message` and the reason, for what goes wrong within, and lets nothing else be printed."""
    with quiet():
        try:
            yield
        except (KeyboardInterrupt, SystemExit, ExportError):
            raise
        except BaseException as error:
            raise ExportError(f"{message}: {error}") from error


@contextmanager
def quiet() -> Iterator[None]:
    """Lets nothing be printed on the standard error, by whatever library."""
    sys.stderr.flush()
    kept = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - not a path of ours
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)

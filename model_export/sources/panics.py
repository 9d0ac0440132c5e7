"""Reports failures of libraries, some of which are panics: these are no Exceptions, and print to standard error."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from model_export.errors import ExportError


@contextmanager
def reported_as(message: str) -> Iterator[None]:
    """Raises ExportError, `message` and the first line of the reason, for any failure within, and prints nothing."""
    with quiet():
        try:
            yield
        except (KeyboardInterrupt, SystemExit, ExportError):
            raise
        except BaseException as error:
            raise ExportError(f"{message}: {first_line(error)}") from error


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its class where it has no message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
    """Discards what any library prints to standard error."""
    sys.stderr.flush()
    stderr = os.dup(2)
    with open(os.devnull, "wb") as nowhere:  # noqa: PTH123 - not a path of ours
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)

"""The library of our own operators: whether it can be used on this machine, and how a session gets it."""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import kernels

# The operators cannot ask a session how many threads it has.
_THREADS_ENTRY = "completion.kernels.threads"


def why_not() -> str | None:
    """Why the operators cannot be used here, in one sentence; None where they can."""
    return kernels.why_not()


def register(options: Any, threads: int) -> None:
    """Lets a session of onnxruntime with these options and that many threads use the operators.

    They must be usable here.
    """
    options.add_session_config_entry(_THREADS_ENTRY, str(threads))
    options.register_custom_ops_library(str(kernels.library()))


def description() -> str:
    """What the operators are here, for readers."""
    reason = why_not()
    return f"own kernels for {kernels.target()}" if reason is None else f"no own kernels: {reason}"


@functools.cache
def identity() -> list[str]:
    """What decides the bits of their results: the processor's instructions that they use, and the library itself."""
    path = kernels.library()
    assert path is not None
    return [kernels.target(), hashlib.sha256(path.read_bytes()).hexdigest()]

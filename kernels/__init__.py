"""Kernels of our own: custom operators for onnxruntime, compiled into a library beside this file.

Installations on x86-64 Linux have the library, others serve the graph of onnxruntime's own operators.
`build_backend.py` builds it from `src/`.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

_LIBRARY = Path(__file__).with_name("_kernels.so")


def library() -> Path | None:
    """The library, for `SessionOptions.register_custom_ops_library`; None where this installation has none."""
    return _LIBRARY if _LIBRARY.is_file() else None


def target() -> str:
    """The code that runs on this processor, `avx2` or `avx512-vnni`; empty where the library has none for it."""
    built = library()
    try:
        return _target(built) if built else ""
    except OSError:
        return ""


def why_not() -> str | None:
    """Why the library cannot be used here, in one sentence; None where it can."""
    built = library()
    if built is None:
        return "this installation has no kernel library: it is built on x86-64 Linux, unless COMPLETION_KERNELS is off"
    try:
        has_code = bool(_target(built))
    except OSError as error:
        return f"the kernel library cannot be loaded: {error}"
    if not has_code:
        return "the kernel library has no code for this processor, which lacks AVX2, FMA or F16C"
    return _refusal(built)


def _target(built: Path) -> str:
    named = ctypes.CDLL(str(built)).completion_kernels_target
    named.argtypes, named.restype = [], ctypes.c_char_p
    return bytes(named()).decode()


def _refusal(built: Path) -> str | None:
    """What onnxruntime says against the library, for example when it lacks functions that the library calls."""
    import onnxruntime as ort  # noqa: PLC0415, it takes long, and the other questions do not need it

    try:
        ort.SessionOptions().register_custom_ops_library(str(built))
    except Exception as error:  # onnxruntime raises its own unrelated types
        return f"onnxruntime {ort.__version__} refuses the kernel library: {error}"
    return None

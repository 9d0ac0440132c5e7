"""Which devices onnxruntime can use on this machine, and why not others."""

from __future__ import annotations

import ctypes
import importlib.metadata
from pathlib import Path
from typing import Literal

import numpy as np
import onnxruntime as ort

from service.engine.ort.device import CPU_PROVIDER, CUDA_PROVIDER
from service.engine.ort.driver import Driver
from service.errors import StartupError

_CUDA_LIBRARY = "libonnxruntime_providers_cuda.so"


def runtime() -> str:
    """The version of onnxruntime, and how it was built."""
    return f"{ort.__version__}, {ort.get_build_info()}"


def provider(wanted: Literal["auto", "cpu", "cuda"], index: int) -> str:
    """Describes the device that will run the model. Raises StartupError when the wanted one is not available."""
    available = ort.get_available_providers()
    lacking = "" if wanted == "cpu" else cuda_obstacle(index)
    if wanted == "cuda" and lacking is not None:
        raise StartupError(cuda_message(lacking))
    if lacking is not None:
        if CPU_PROVIDER not in available:
            raise StartupError(f"onnxruntime {ort.__version__} has no {CPU_PROVIDER}, only {', '.join(available)}")
        why = f"; not CUDA: {lacking}" if lacking and CUDA_PROVIDER in available else ""
        return f"onnxruntime {ort.__version__}, {CPU_PROVIDER}{why}"
    driver = Driver(index)
    return f"onnxruntime {ort.__version__}, {CUDA_PROVIDER} on {driver.name}, {driver.free() >> 20} MiB free"


def cuda_message(lacking: str) -> str:
    """The error message when CUDA is asked for and not available."""
    return f"--device cuda is not available: {lacking}"


def cuda_obstacle(index: int) -> str | None:
    """Why onnxruntime cannot use the GPU of that index; None if it can."""
    if CUDA_PROVIDER not in ort.get_available_providers():
        return f"{_package()}; install the extra `gpu` instead of `cpu`: pip install 'completion-service[gpu]'"
    try:
        Driver(index)
    except StartupError as error:
        return str(error)
    ort.preload_dlls()
    try:
        ort.OrtValue.ortvalue_from_shape_and_type([1], np.uint8, "cuda", index)
    except Exception as error:  # onnxruntime raises its own unrelated types
        return f"onnxruntime's {CUDA_PROVIDER} does not work: {_missing_library() or error}"
    return None


def _package() -> str:
    """Names the installed onnxruntime, which has no CUDA provider."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        other = "" if name == "onnxruntime-gpu" else "onnxruntime-gpu is not installed: "
        return f"{other}{name} {version} has no {CUDA_PROVIDER}, only {', '.join(ort.get_available_providers())}"
    return f"onnxruntime-gpu is not installed, and onnxruntime {ort.__version__} has no {CUDA_PROVIDER}"


def _missing_library() -> str | None:
    """The missing library that keeps the CUDA provider from loading, if one is missing."""
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / _CUDA_LIBRARY))
    except OSError as error:
        return f"{error} (CUDA's libraries come with the extra `gpu`)"
    return None

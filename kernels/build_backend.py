"""Builds this package: scikit-build-core's backend, and a C++ compiler from PyPI on machines that have none.

The library of kernels is compiled on x86-64 Linux. Elsewhere, and with COMPLETION_KERNELS=off, the package is pure
Python. An editable installation has the library beside its sources, is compiled when it is installed, and only again
when it is installed after a source has changed. The functions without an underscore that are not described here are the
hooks of PEP 517 and PEP 660.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import platform
import shutil
import sys
import tempfile
import zipfile
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from scikit_build_core import build as scikit
from scikit_build_core.build import build_sdist, get_requires_for_build_sdist

__all__ = [
    "build_editable",
    "build_sdist",
    "build_wheel",
    "get_requires_for_build_editable",
    "get_requires_for_build_sdist",
    "get_requires_for_build_wheel",
    "prepare_metadata_for_build_editable",
    "prepare_metadata_for_build_wheel",
]

Settings = dict[str, list[str] | str]

SWITCH = "COMPLETION_KERNELS"
COMPILERS = ("c++", "g++", "clang++")
# The newest with a Clang that compiles Highway 1.3.0; CMakeLists.txt says why later ones do not.
COMPILER_PACKAGE = "ziglang==0.16.0"
# Names neither this machine's processor nor its glibc, so that the library runs on others.
COMPILER_TARGET = "x86_64-linux-gnu.2.28"

_ROOT = Path(__file__).resolve().parent.parent
_KERNELS = _ROOT / "kernels"
_LIBRARY = _KERNELS / "_kernels.so"
_SOURCES = ("CMakeLists.txt", "exports.map", "src", "third_party")
# What an editable installation imports from.
_IMPORT_ROOTS = (_ROOT, _ROOT / "proto")


def get_requires_for_build_wheel(config_settings: Settings | None = None) -> list[str]:
    needed = scikit.get_requires_for_build_wheel(_settings(config_settings, compiles=_has_kernels()))
    return [*needed, COMPILER_PACKAGE] if _has_kernels() and not _has_compiler() else needed


def get_requires_for_build_editable(config_settings: Settings | None = None) -> list[str]:
    if _is_fresh():
        return scikit.get_requires_for_build_wheel(_settings(config_settings, compiles=False))
    return get_requires_for_build_wheel(config_settings)


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: Settings | None = None) -> str:
    settings = _settings(config_settings, compiles=_has_kernels())
    return scikit.prepare_metadata_for_build_wheel(metadata_directory, settings)


def prepare_metadata_for_build_editable(metadata_directory: str, config_settings: Settings | None = None) -> str:
    return scikit.prepare_metadata_for_build_wheel(metadata_directory, _settings(config_settings, compiles=False))


def build_wheel(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    settings = _settings(config_settings, compiles=_has_kernels())
    with _compiler():
        return scikit.build_wheel(wheel_directory, settings, metadata_directory)


def build_editable(
    wheel_directory: str, config_settings: Settings | None = None, metadata_directory: str | None = None
) -> str:
    if not _has_kernels():
        _LIBRARY.unlink(missing_ok=True)
    elif not _is_fresh():
        _build_library(config_settings)
    with tempfile.TemporaryDirectory() as folder:
        settings = _settings(config_settings, compiles=False)
        name = scikit.build_wheel(folder, settings, metadata_directory)
        _pointing_at_sources(Path(folder, name), Path(wheel_directory, name))
    return name


def _has_kernels() -> bool:
    """Whether the library is to be built here."""
    switch = os.environ.get(SWITCH) or "on"
    if switch not in {"on", "off"}:
        raise SystemExit(f"{SWITCH} is {switch!r}, and must be on or off")
    return switch == "on" and sys.platform == "linux" and platform.machine() == "x86_64"


def _has_compiler() -> bool:
    return bool(os.environ.get("CXX")) or any(shutil.which(name) for name in COMPILERS)


def _settings(given: Settings | None, *, compiles: bool) -> Settings:
    """Scikit-build-core's settings; without compiling it makes a wheel of Python files only."""
    return {**(given or {}), **({} if compiles else {"wheel.cmake": "false"})}


def _is_fresh() -> bool:
    """Whether the library beside the sources is newer than all of them."""
    sources = [path for source in _SOURCES for path in (_KERNELS / source, *(_KERNELS / source).rglob("*"))]
    changed = max(path.stat().st_mtime_ns for path in sources)
    return _has_kernels() and _LIBRARY.is_file() and _LIBRARY.stat().st_mtime_ns > changed


def _build_library(config_settings: Settings | None) -> None:
    """Puts the library beside its sources. What runs keeps the file that it has loaded."""
    with tempfile.TemporaryDirectory() as folder:
        with zipfile.ZipFile(Path(folder, build_wheel(folder, config_settings))) as wheel:
            wheel.extract(str(_LIBRARY.relative_to(_ROOT)), folder)
        built = _LIBRARY.with_suffix(".new")
        shutil.copyfile(Path(folder) / _LIBRARY.relative_to(_ROOT), built)
        built.replace(_LIBRARY)


@contextmanager
def _compiler() -> Iterator[None]:
    """Names the compiler from PyPI to CMake where it is installed and the machine has none."""
    if not _has_kernels() or _has_compiler() or not (package := importlib.util.find_spec("ziglang")):
        yield
        return
    program = Path(str(package.origin)).with_name("zig")
    os.environ["CXX"] = f"{program} c++ -target {COMPILER_TARGET}"
    try:
        yield
    finally:
        del os.environ["CXX"]


def _pointing_at_sources(wheel: Path, editable: Path) -> None:
    """Writes a wheel with the metadata of `wheel` that adds the sources' folders to Python's path."""
    with zipfile.ZipFile(wheel) as read:
        files = {name: read.read(name) for name in read.namelist() if ".dist-info/" in name}
    (record,) = [name for name in files if name.endswith("/RECORD")]
    del files[record]
    files["_completion_service.pth"] = "".join(f"{folder}\n" for folder in _IMPORT_ROOTS).encode()
    lines = [f"{name},sha256={_digest(content)},{len(content)}\n" for name, content in files.items()]
    files[record] = "".join([*lines, f"{record},,\n"]).encode()
    with zipfile.ZipFile(editable, "w") as written:
        for name, content in files.items():
            written.writestr(name, content)


def _digest(content: bytes) -> str:
    return urlsafe_b64encode(hashlib.sha256(content).digest()).decode().rstrip("=")

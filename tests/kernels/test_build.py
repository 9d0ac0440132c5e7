"""The build of the kernel library: into wheels, beside the sources, with a compiler from PyPI, and not at all."""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import onnxruntime
import pytest

import kernels
from kernels import build_backend
from tests.support.stack import ROOT

pytestmark = pytest.mark.skipif(
    (sys.platform, platform.machine()) != ("linux", "x86_64"), reason="the library is for x86-64 Linux"
)

TOOLS = ("cmake", "ninja")
COMPILES = any(shutil.which(name) for name in build_backend.COMPILERS)
CAN_BUILD = COMPILES and all(map(shutil.which, TOOLS))
# Compiles in a second, and has what the library's Python side calls.
SOURCE = """\
#include "onnxruntime_c_api.h"
#define EXPORTED extern "C" __attribute__((visibility("default")))
EXPORTED const char* completion_kernels_target() { return "made"; }
EXPORTED OrtStatus* ORT_API_CALL RegisterCustomOps(OrtSessionOptions*, const OrtApiBase* base) {
  return base->GetApi(1)->CreateStatus(ORT_FAIL, "no operators");
}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """What the package is built from, with one small source instead of the kernels."""
    project = tmp_path / "project"
    left_out = shutil.ignore_patterns("__pycache__", "src", "_kernels.so")
    for name in ("service", "model_export", "proto", "kernels"):
        shutil.copytree(ROOT / name, project / name, ignore=left_out)
    for name in ("pyproject.toml", "README.md", ".gitignore"):
        shutil.copyfile(ROOT / name, project / name)
    (project / "kernels" / "src").mkdir()
    (project / "kernels" / "src" / "operators.cc").write_text(SOURCE)
    return project


def wheel_of(project: Path, **environment: str) -> Path:
    """Builds a wheel with pip; where there are no tools to compile with, pip fetches them."""
    off = environment.get(build_backend.SWITCH) == "off"
    flags = ["--no-build-isolation"] if CAN_BUILD or off else []
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", *flags, "--wheel-dir", project / "wheels", project]
    run = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout + run.stderr
    (wheel,) = (project / "wheels").glob("*.whl")
    return wheel


def asked(folder: Path, expression: str) -> str:
    """What an expression about the package `kernels` in `folder` is."""
    code = f"import kernels; print({expression})"
    return subprocess.run(
        [sys.executable, "-P", "-c", code],
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


def test_a_wheel_has_the_library(project: Path) -> None:
    """For x86-64 Linux and any Python, with the packages and the stubs, and without what the library is built from."""
    wheel = wheel_of(project)
    assert wheel.name.endswith("-py3-none-linux_x86_64.whl")
    with zipfile.ZipFile(wheel) as opened:
        names = set(opened.namelist())
        opened.extractall(project / "installed")
    assert {name for name in names if name.startswith("kernels/")} == {"kernels/__init__.py", "kernels/_kernels.so"}
    assert {"service/__main__.py", "model_export/__main__.py", "model_export/graph/cuda_kernels.json"} <= names
    assert {"completion/v1/completion_pb2.py", "buf/validate/validate_pb2.py"} <= names
    assert asked(project / "installed", "kernels.library()") == str(project / "installed/kernels/_kernels.so")
    assert asked(project / "installed", "kernels.target()") == "made"


def test_a_wheel_without_the_library(project: Path) -> None:
    """COMPLETION_KERNELS=off: for any machine, also if an editable installation has left a library in the sources."""
    (project / "kernels" / "_kernels.so").write_bytes(b"")
    (project / ".gitignore").unlink()
    wheel = wheel_of(project, COMPLETION_KERNELS="off")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as opened:
        assert [name for name in opened.namelist() if name.startswith("kernels/")] == ["kernels/__init__.py"]
        opened.extractall(project / "installed")
    assert asked(project / "installed", "kernels.library()") == "None"
    assert asked(project / "installed", "kernels.why_not()").startswith("this installation has no kernel library")


@pytest.fixture
def backend(project: Path) -> Callable[..., str]:
    """Calls a hook of the backend in the project, as installers do; returns what it printed."""

    def call(hook: str, *arguments: str, ok: bool = True, **environment: str) -> str:
        code = f"import build_backend, sys; print(build_backend.{hook}(*sys.argv[1:]))"
        run = subprocess.run(
            [sys.executable, "-c", code, *arguments],
            cwd=project,
            env={**os.environ, "PYTHONPATH": str(project / "kernels"), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert (run.returncode == 0) == ok, run.stdout
        return run.stdout

    return call


@pytest.mark.skipif(not CAN_BUILD, reason="there are no tools to compile with")
def test_an_editable_installation_compiles_once(project: Path, backend: Callable[..., str]) -> None:
    """The library lies beside the sources until one of them changes; the wheel has the path and no code."""
    built = project / "kernels" / "_kernels.so"
    name = backend("build_editable", str(project)).split()[-1]
    with zipfile.ZipFile(project / name) as opened:
        assert opened.read("_completion_service.pth").decode() == f"{project}\n{project}/proto\n"
        assert all(".dist-info/" in name for name in opened.namelist() if name != "_completion_service.pth")
    assert asked(project, "kernels.target()") == "made"

    first = built.stat()
    assert "CMake" not in backend("build_editable", str(project))
    assert built.stat() == first
    assert not re.search("cmake|ninja", backend("get_requires_for_build_editable"))

    source = project / "kernels" / "src" / "operators.cc"
    source.write_text(SOURCE.replace("made", "changed"))
    backend("build_editable", str(project))
    assert asked(project, "kernels.target()") == "changed"

    backend("build_editable", str(project), COMPLETION_KERNELS="off")
    assert not built.exists()


@pytest.mark.skipif(not CAN_BUILD, reason="there are no tools to compile with")
def test_a_source_that_does_not_compile(project: Path, backend: Callable[..., str]) -> None:
    """The last line says what failed and what helps."""
    (project / "kernels" / "src" / "operators.cc").write_text("this is no C++")
    told = backend("build_editable", str(project), ok=False)
    assert told.splitlines()[-1] == (
        "The kernel library could not be compiled: "
        "set CXX to another C++ compiler, or COMPLETION_KERNELS=off to install without it."
    )


@pytest.mark.parametrize("hook", ["get_requires_for_build_wheel", "get_requires_for_build_editable"])
def test_a_compiler_is_asked_for(tmp_path: Path, project: Path, monkeypatch: pytest.MonkeyPatch, hook: str) -> None:
    """Only where the library is to be built and the machine has none."""
    monkeypatch.chdir(project)
    monkeypatch.setattr(build_backend, "_LIBRARY", project / "kernels" / "_kernels.so")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(build_backend.SWITCH, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))

    def names() -> list[str]:
        return [re.split("[<>=]", item)[0] for item in getattr(build_backend, hook)()]

    assert names() == ["cmake", "ninja", "ziglang"]
    monkeypatch.setenv("CXX", "/opt/compiler")
    assert names() == ["cmake", "ninja"]
    monkeypatch.delenv("CXX")
    compiler = tmp_path / "clang++"
    compiler.touch(mode=0o755)
    assert names() == ["cmake", "ninja"]
    compiler.unlink()
    monkeypatch.setenv(build_backend.SWITCH, "off")
    assert names() == []
    monkeypatch.setenv(build_backend.SWITCH, "on")
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert names() == []


def test_an_unknown_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another value than on and off is refused, rather than taken for one of them."""
    monkeypatch.setenv(build_backend.SWITCH, "no")
    with pytest.raises(SystemExit, match=r"^COMPLETION_KERNELS is 'no', and must be on or off$"):
        build_backend.get_requires_for_build_wheel()


@pytest.mark.slow
def test_the_compiler_from_pypi(project: Path, tmp_path: Path) -> None:
    """On a machine without compiler, CMake and Ninja pip fetches all, and the library runs here. Takes minutes."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "sh").symlink_to("/bin/sh")
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, project]
    subprocess.run(command, env={**os.environ, "PATH": str(tools)}, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as opened:
        opened.extractall(tmp_path / "installed")
    assert asked(tmp_path / "installed", "kernels.target()") == "made"


@pytest.mark.skipif(kernels.library() is None, reason="this installation has no library")
def test_the_library_of_this_installation() -> None:
    """It has code for a processor with AVX2, and onnxruntime takes it."""
    assert kernels.target() in {"avx2", "avx512-vnni"} or "processor" in str(kernels.why_not())
    assert kernels.why_not() is None or not kernels.target()


def test_why_there_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A missing and a damaged library."""
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "_kernels.so")
    assert (kernels.library(), kernels.target()) == (None, "")
    assert kernels.why_not() == (
        "this installation has no kernel library: it is built on x86-64 Linux, unless COMPLETION_KERNELS is off"
    )
    (tmp_path / "_kernels.so").write_text("no library")
    assert kernels.target() == ""
    assert str(kernels.why_not()).startswith(f"the kernel library cannot be loaded: {tmp_path}/_kernels.so: ")


@pytest.mark.skipif(not COMPILES, reason="there is no compiler")
@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("", "the kernel library has no code for this processor, which lacks AVX2, FMA or F16C"),
        ("made", f"onnxruntime {onnxruntime.__version__} refuses the kernel library: .*no operators"),
    ],
)
def test_why_it_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, expected: str) -> None:
    """A library without code for the processor, and one that onnxruntime does not take."""
    (tmp_path / "made.cc").write_text(SOURCE.replace("made", target))
    compiler = next(filter(None, map(shutil.which, build_backend.COMPILERS)))
    headers = ROOT / "kernels" / "third_party" / "onnxruntime"
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-isystem", headers, tmp_path / "made.cc", "-o", tmp_path / "_kernels.so"],
        check=True,
    )
    monkeypatch.setattr(kernels, "_LIBRARY", tmp_path / "_kernels.so")
    assert kernels.target() == target
    assert re.fullmatch(expected, str(kernels.why_not()))

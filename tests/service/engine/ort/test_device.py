"""Options for onnxruntime and calls of NVIDIA's driver, and the messages on a machine without CUDA."""

from __future__ import annotations

import ctypes
import importlib.metadata
import types

import numpy as np
import pytest

from service.engine.ort import availability, device, driver
from service.errors import StartupError


def test_provider_options():
    """Exactly these: a limit of memory, an arena that grows by what is asked for, and captured graphs."""
    assert device.provider_options(1, 5 << 30) == {
        "device_id": "1",
        "gpu_mem_limit": "5368709120",
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
        "use_tf32": "0",
        "sdpa_kernel": "3",
    }


def test_run_options():
    """A run is captured under its number, or expressly not."""
    numbers = [device.run_options(graph).get_run_config_entry("gpu_graph_id") for graph in (None, 0, 7)]
    assert numbers == ["-1", "0", "7"]


def test_a_session_is_for_the_gpu_alone(monkeypatch, tmp_path):
    """CUDA is the only provider, and what it lacks is no reason to compute on the CPU."""
    made = []

    def session(graph, options, providers):
        made.append((graph, options, providers))
        return types.SimpleNamespace(get_providers=lambda: ["CUDAExecutionProvider", "CPUExecutionProvider"])

    monkeypatch.setattr(device.ort, "InferenceSession", session)
    device.Cuda(None, 2, 1000).load(tmp_path / "model.onnx", 3)
    ((graph, options, providers),) = made
    assert graph == tmp_path / "model.onnx"
    assert options.get_session_config_entry("session.disable_cpu_ep_fallback") == "1"
    assert options.intra_op_num_threads == 3
    assert providers == [("CUDAExecutionProvider", device.provider_options(2, 1000))]


def test_a_provider_that_does_not_start_is_no_silent_fallback(monkeypatch, tmp_path):
    """That onnxruntime only logs it and takes the CPU is an error."""
    silent = types.SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    monkeypatch.setattr(device.ort, "InferenceSession", lambda *_, **__: silent)
    with pytest.raises(StartupError, match="onnxruntime did not take its CUDAExecutionProvider"):
        device.Cuda(None, 0, 1000).load(tmp_path / "model.onnx", 1)


class Library:
    """Some of NVIDIA's driver: two GPUs and their memory, which is the host's. Notes every call."""

    def __init__(self, fails=None):
        self.calls = []
        self.memory = []
        answers = {
            "cuDeviceGetCount": lambda count: setattr(count._obj, "value", 2),
            "cuDeviceGetName": lambda name, size, number: setattr(name, "value", b"Two"),
            "cuMemGetInfo_v2": lambda free, total: setattr(free._obj, "value", 3 << 30),
            "cuMemAlloc_v2": self._allocate,
            "cuMemHostAlloc": lambda pointer, size, flags: self._allocate(pointer, size),
            "cuMemsetD8_v2": lambda address, value, size: ctypes.memset(address.value, value, size),
            "cuMemcpyHtoD_v2": ctypes.memmove,
            "cuMemcpyDtoH_v2": ctypes.memmove,
            "cuGetErrorString": lambda code, text: setattr(text._obj, "value", b"no CUDA-capable device is detected"),
        }
        for name in driver.SIGNATURES:
            setattr(self, name, self._function(name, answers.get(name), (fails or {}).get(name, 0)))

    def _function(self, name, answer, code):
        def call(*arguments):
            self.calls.append((name, arguments))
            if answer and not code:
                answer(*arguments)
            return code

        return call

    def _allocate(self, address, size):
        self.memory.append(np.full(size, 7, np.uint8))
        address._obj.value = self.memory[-1].ctypes.data


def loaded(monkeypatch, library, index=0):
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)
    return driver.Driver(index)


def test_the_driver_by_its_calls(monkeypatch):
    """Memory is zero, goes to and from the GPU by address, and every call is in the GPU's context."""
    library = Library()
    opened = loaded(monkeypatch, library, 1)
    assert (opened.name, opened.free()) == ("Two", 3 << 30)
    address, host = opened.allocate(8), opened.host_memory(8)
    assert library.memory[0].tolist() == [0] * 8
    host[:] = range(8)
    opened.send(address, host)
    opened.fetch(host[:4], address + 4)
    assert host.tolist() == [4, 5, 6, 7, 4, 5, 6, 7]
    opened.release(address, host)
    names = [name for name, _ in library.calls]
    started = names.index("cuDevicePrimaryCtxRetain") + 1
    assert names[started::2] == ["cuCtxSetCurrent"] * len(names[started::2])
    assert names[-3:] == ["cuMemFree_v2", "cuCtxSetCurrent", "cuMemFreeHost"]


def test_rows_are_copied_by_one_call(monkeypatch):
    """A copy within the GPU is of rows as far apart as they are, from one address to another."""
    library = Library()
    loaded(monkeypatch, library).copy_rows(1000, 2000, rows=3, pitch=64, width=10)
    name, (described,) = library.calls[-1]
    made = described._obj
    assert name == "cuMemcpy2DUnaligned_v2"
    assert (made.dstDevice, made.srcDevice, made.Height, made.WidthInBytes) == (1000, 2000, 3, 10)
    assert made.srcPitch == made.dstPitch == 64
    assert made.srcMemoryType == made.dstMemoryType == 2  # CU_MEMORYTYPE_DEVICE


def test_the_layout_of_a_copy():
    """CUDA_MEMCPY2D as CUDA 13's own header lays it out on a 64-bit machine."""
    offsets = [getattr(driver.Copy2D, name).offset for name, *_ in driver.Copy2D._fields_]
    assert offsets == [0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120]
    assert ctypes.sizeof(driver.Copy2D) == 128


@pytest.mark.parametrize(
    ("library", "index", "said"),
    [
        (Library({"cuInit": 100}), 0, r"cuInit failed: no CUDA-capable device is detected \(100\)"),
        (Library(), 2, r"there is no GPU 2 \(--device-id\): the driver shows 2, counted from 0"),
    ],
)
def test_no_gpu(monkeypatch, library, index, said):
    """A driver without a GPU, or without that one, says so."""
    with pytest.raises(StartupError, match=said):
        loaded(monkeypatch, library, index)


def test_memory_that_runs_out(monkeypatch):
    """Too little memory keeps the service from starting; a copy that fails is a fault of a step."""
    library = Library({"cuMemAlloc_v2": 2, "cuMemcpyDtoH_v2": 700})
    opened = loaded(monkeypatch, library)
    with pytest.raises(StartupError, match="cuMemAlloc_v2 failed"):
        opened.allocate(8)
    with pytest.raises(RuntimeError, match=r"cuMemcpyDtoH_v2 failed: .* \(700\)"):
        opened.fetch(np.zeros(1, np.uint8), 0)


@pytest.fixture
def build(monkeypatch):
    """Makes the installed onnxruntime one with CUDA's provider, a driver, and whatever the probe does."""

    def make(providers=("CUDAExecutionProvider", "CPUExecutionProvider"), library=None, probe=lambda *_: None):
        monkeypatch.setattr(device.ort, "get_available_providers", lambda: list(providers))
        monkeypatch.setattr(device.ort, "preload_dlls", lambda: None)
        monkeypatch.setattr(device.ort, "OrtValue", types.SimpleNamespace(ortvalue_from_shape_and_type=probe))
        if library is not None:
            monkeypatch.setattr(driver.ctypes, "CDLL", lambda name: library)

    return make


def test_the_package_is_missing(build):
    """The CPU's package is named, and what to install in its place."""
    build(["CPUExecutionProvider"])
    lacking = availability.cuda_obstacle(0)
    assert lacking.startswith("onnxruntime-gpu is not installed: onnxruntime ")
    assert lacking.endswith("install the extra `gpu` instead of `cpu`: pip install 'completion-service[gpu]'")


def test_the_package_has_no_provider(build, monkeypatch):
    """A build of the right name without CUDA is named with what it has."""
    build(["CPUExecutionProvider"])
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "9.9")
    assert availability.cuda_obstacle(0).startswith(
        "onnxruntime-gpu 9.9 has no CUDAExecutionProvider, only CPUExecutionProvider"
    )


def test_the_driver_is_missing(build, monkeypatch):
    """This machine's own loader says that there is no libcuda."""
    build()
    monkeypatch.setattr(driver, "LIBRARY", "libcuda-that-is-not.so.1")
    assert availability.cuda_obstacle(0).startswith(
        "there is no NVIDIA driver here: libcuda-that-is-not.so.1: cannot open"
    )


def test_cuda_libraries_are_missing(build, monkeypatch):
    """The error names the library that the provider cannot load."""

    def probe(*_):
        raise RuntimeError("CUDA Provider not available")

    build(library=Library(), probe=probe)

    def missing(name):
        raise OSError("libcublasLt.so.13: cannot open shared object file")

    opened = driver.Driver(0)
    monkeypatch.setattr(availability, "Driver", lambda index: opened)
    monkeypatch.setattr(availability.ctypes, "CDLL", missing)
    lacking = availability.cuda_obstacle(0)
    assert "does not work: libcublasLt.so.13: cannot open" in lacking
    assert "come with the extra `gpu`" in lacking


def test_what_computes(build):
    """Asked for, CUDA is there or an error; left to itself, the service takes the GPU, else the CPU and says why."""
    build(library=Library())
    assert "CUDAExecutionProvider on Two, 3072 MiB free" in availability.provider("cuda", 0)
    assert "CUDAExecutionProvider on Two" in availability.provider("auto", 1)
    assert availability.provider("cpu", 0).endswith("CPUExecutionProvider")
    with pytest.raises(StartupError, match=r"--device cuda is not available: there is no GPU 5"):
        availability.provider("cuda", 5)
    assert "not CUDA: there is no GPU 5 (--device-id)" in availability.provider("auto", 5)
    build(["CPUExecutionProvider"])
    assert availability.provider("auto", 0).endswith("CPUExecutionProvider")

"""The calls of NVIDIA's driver that the engine needs for its own memory on a GPU, by ctypes."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_char_p, c_int, c_size_t, c_uint64, c_void_p

import numpy as np
import numpy.typing as npt

from service.errors import StartupError

LIBRARY = "libcuda.so.1"

Bytes = npt.NDArray[np.uint8]

_DEVICE_MEMORY = 2
# Flag for pinned memory on the host: only with pinned memory is a copy complete when the call returns.
_PORTABLE = 1


class Copy2D(ctypes.Structure):
    """CUDA_MEMCPY2D of cuda.h."""

    _fields_ = (
        ("srcXInBytes", c_size_t),
        ("srcY", c_size_t),
        ("srcMemoryType", c_int),
        ("srcHost", c_void_p),
        ("srcDevice", c_uint64),
        ("srcArray", c_void_p),
        ("srcPitch", c_size_t),
        ("dstXInBytes", c_size_t),
        ("dstY", c_size_t),
        ("dstMemoryType", c_int),
        ("dstHost", c_void_p),
        ("dstDevice", c_uint64),
        ("dstArray", c_void_p),
        ("dstPitch", c_size_t),
        ("WidthInBytes", c_size_t),
        ("Height", c_size_t),
    )


SIGNATURES = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorString": (c_int, POINTER(c_char_p)),
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDevicePrimaryCtxRetain": (POINTER(c_void_p), c_int),
    "cuCtxSetCurrent": (c_void_p,),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_uint64), c_size_t),
    "cuMemFree_v2": (c_uint64,),
    "cuMemFreeHost": (c_void_p,),
    "cuMemHostAlloc": (POINTER(c_void_p), c_size_t, ctypes.c_uint),
    "cuMemsetD8_v2": (c_uint64, ctypes.c_ubyte, c_size_t),
    "cuMemcpyHtoD_v2": (c_uint64, c_void_p, c_size_t),
    "cuMemcpyDtoH_v2": (c_void_p, c_uint64, c_size_t),
    "cuMemcpy2DUnaligned_v2": (POINTER(Copy2D),),
}


class Driver:
    """One GPU's memory, in the context that onnxruntime uses as well.

    Copies do not wait for a run of onnxruntime: it must have returned before. `send` and `fetch` are complete when they
    return, `copy_rows` is complete after `wait`. Any thread may use it.
    """

    def __init__(self, index: int) -> None:
        """Raises StartupError when there is no driver, or no GPU of that index."""
        try:
            self._library = ctypes.CDLL(LIBRARY)
        except OSError as error:
            raise StartupError(f"there is no NVIDIA driver here: {error}") from None
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, c_int
        self._call("cuInit", 0)
        count, device = c_int(), c_int()
        self._call("cuDeviceGetCount", byref(count))
        if index >= count.value:
            raise StartupError(f"there is no GPU {index} (--device-id): the driver shows {count.value}, counted from 0")
        self._call("cuDeviceGet", byref(device), index)
        title = ctypes.create_string_buffer(256)
        self._call("cuDeviceGetName", title, len(title), device)
        self.name = title.value.decode()
        self._context = c_void_p()
        self._call("cuDevicePrimaryCtxRetain", byref(self._context), device)

    def free(self) -> int:
        """The free memory of the GPU, in bytes."""
        free, total = c_size_t(), c_size_t()
        self._do("cuMemGetInfo_v2", byref(free), byref(total))
        return free.value

    def allocate(self, size: int) -> int:
        """Allocates `size` zero bytes on the GPU; returns their address."""
        address = c_uint64()
        self._do("cuMemAlloc_v2", byref(address), size)
        self._do("cuMemsetD8_v2", address, 0, size)
        self.wait()
        return address.value

    def host_memory(self, size: int) -> Bytes:
        """Allocates `size` bytes on the host for copies to and from the GPU."""
        pointer = c_void_p()
        self._do("cuMemHostAlloc", byref(pointer), size, _PORTABLE)
        assert pointer.value is not None
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(pointer.value))

    def release(self, address: int, host: Bytes) -> None:
        """Frees memory from `allocate` and from `host_memory`."""
        self._do("cuMemFree_v2", address)
        self.release_host(host)

    def release_host(self, host: Bytes) -> None:
        """Frees memory from `host_memory`."""
        self._do("cuMemFreeHost", host.ctypes.data)

    def send(self, target: int, source: Bytes) -> None:
        """Copies from `host_memory` to the GPU."""
        self._do("cuMemcpyHtoD_v2", target, source.ctypes.data, source.nbytes)

    def fetch(self, target: Bytes, source: int) -> None:
        """Copies from the GPU into `host_memory`."""
        self._do("cuMemcpyDtoH_v2", target.ctypes.data, source, target.nbytes)

    def copy_rows(self, target: int, source: int, *, rows: int, pitch: int, width: int) -> None:
        """Copies `width` bytes of each of `rows` rows, which are `pitch` bytes apart, within the GPU."""
        self._do(
            "cuMemcpy2DUnaligned_v2",
            byref(
                Copy2D(
                    srcMemoryType=_DEVICE_MEMORY,
                    srcDevice=source,
                    srcPitch=pitch,
                    dstMemoryType=_DEVICE_MEMORY,
                    dstDevice=target,
                    dstPitch=pitch,
                    WidthInBytes=width,
                    Height=rows,
                )
            ),
        )

    def wait(self) -> None:
        """Waits for everything on the GPU."""
        self._do("cuCtxSynchronize")

    def _do(self, name: str, *arguments: object) -> None:
        """Calls the driver in this GPU's context, which every thread has to enter."""
        self._call("cuCtxSetCurrent", self._context)
        self._call(name, *arguments)

    def _call(self, name: str, *arguments: object) -> None:
        code = getattr(self._library, name)(*arguments)
        if code:
            text = c_char_p()
            self._library.cuGetErrorString(code, byref(text))
            message = f"NVIDIA's driver: {name} failed: {(text.value or b'unknown error').decode()} ({code})"
            raise StartupError(message) if name in _STARTING else RuntimeError(message)


# An error of these calls keeps the service from starting; an error of any other call is a fault of a step.
_STARTING = frozenset(name for name in SIGNATURES if name.startswith(("cuInit", "cuDevice"))) | {
    "cuMemAlloc_v2",
    "cuMemHostAlloc",
    "cuMemGetInfo_v2",
}

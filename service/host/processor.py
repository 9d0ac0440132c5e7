"""Reads the processor's features from the processor itself: CPUID on x86-64, HWCAP on arm64.

For an emulated processor this gives the emulated features, while /proc/cpuinfo would give those of the host.
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import platform
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np

# With this option onnxruntime multiplies unsigned by unsigned bytes where signed bytes could overflow 16-bit sums.
EXACT_BYTES_OPTION = "session.x64quantprecision"

# cpuid(leaf, subleaf, uint32[4]): the registers EAX, EBX, ECX and EDX, in this order.
_CPUID = bytes.fromhex("53 89f8 89f1 4989d0 0fa2 418900 41895804 41894808 4189500c 5b c3")
# xgetbv(): the low half of XCR0, a bit for each set of registers that the operating system saves.
_XGETBV = bytes.fromhex("31c9 0f01d0 c3")
# Bits of XCR0 that AVX, AVX-512 and AMX need.
_AVX_STATE, _AVX512_STATE, _AMX_STATE = 0x6, 0xE6, 0x60000
# Key of the hardware capabilities in the auxiliary vector that Linux gives each process, and one of their bits.
_AT_HWCAP = 16
_HWCAP_DOT_PRODUCTS = 1 << 20

Instructions = Literal["baseline", "AVX", "AVX2", "AVX-512", "AMX", "NEON"]


@dataclass(frozen=True, slots=True)
class Processor:
    """A processor's name, the widest instructions that onnxruntime has kernels for, and how it multiplies bytes."""

    name: str
    instructions: Instructions
    # Whether one instruction sums products of 8-bit numbers in 32 bits (VNNI on x86-64), which is exact and fast.
    byte_dot_products: bool

    def __str__(self) -> str:
        products = "with" if self.byte_dot_products else "without"
        return f"{self.name}, {self.instructions} kernels {products} 8-bit dot products"


@functools.cache
def processor() -> Processor:
    """The processor that this process runs on.

    When the operating system forbids the query, the answer is a processor with only the baseline of its architecture.
    """
    machine = platform.machine()
    try:
        if machine in {"x86_64", "AMD64"}:
            return _x86(_Cpuid())
        if machine in {"aarch64", "arm64"}:
            return _arm64()
    except OSError as error:
        return Processor(f"{machine} (unknown: {error.strerror})", "baseline", byte_dot_products=False)
    return Processor(machine, "baseline", byte_dot_products=False)


def byte_options() -> dict[str, str]:
    """The onnxruntime session options that make 8-bit products exact on this processor."""
    return {} if processor().byte_dot_products else {EXACT_BYTES_OPTION: "1"}


class _Cpuid:
    """Runs the two instructions that describe an x86-64 processor. Raises OSError when the system forbids that."""

    def __init__(self) -> None:
        # Systems that forbid pages which are both writable and executable still allow executable pages of a file.
        file = os.memfd_create("cpuid", os.MFD_CLOEXEC)
        try:
            os.write(file, _CPUID + _XGETBV)
            self._code = mmap.mmap(file, 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_EXEC)
        finally:
            os.close(file)
        address = np.frombuffer(self._code, np.uint8).ctypes.data
        arguments = (ctypes.c_uint32, ctypes.c_uint32, ctypes.POINTER(ctypes.c_uint32))
        self._cpuid: Callable[..., None] = ctypes.CFUNCTYPE(None, *arguments)(address)
        self._xgetbv: Callable[[], int] = ctypes.CFUNCTYPE(ctypes.c_uint32)(address + len(_CPUID))

    def leaf(self, leaf: int, subleaf: int = 0) -> tuple[int, int, int, int]:
        """EAX, EBX, ECX and EDX of a leaf; all zero when the processor does not have that leaf."""
        highest = self._registers(leaf & 0x80000000, 0)[0]
        return self._registers(leaf, subleaf) if leaf <= highest else (0, 0, 0, 0)

    def saved_registers(self) -> int:
        """XCR0: the sets of registers that the operating system saves."""
        return self._xgetbv() if self.leaf(1)[2] >> 27 & 1 else 0

    def _registers(self, leaf: int, subleaf: int) -> tuple[int, int, int, int]:
        registers = (ctypes.c_uint32 * 4)()
        self._cpuid(leaf, subleaf, registers)
        eax, ebx, ecx, edx = registers
        return eax, ebx, ecx, edx


def _x86(cpuid: _Cpuid) -> Processor:
    """Applies the rules by which onnxruntime chooses kernels (onnxruntime/core/mlas/lib/platform.cpp)."""
    saved = cpuid.saved_registers()
    ebx, ecx, edx = cpuid.leaf(7)[1:]
    instructions: Instructions = "baseline"
    byte_dot_products = False
    if saved & _AVX_STATE == _AVX_STATE and cpuid.leaf(1)[2] >> 28 & 1:
        instructions = "AVX"
        if ebx >> 5 & 1 and cpuid.leaf(1)[2] >> 12 & 1:  # AVX2 and FMA
            instructions = "AVX2"
            byte_dot_products = bool(cpuid.leaf(7, 1)[0] >> 4 & 1)  # AVX-VNNI
            # AVX512F, AVX512DQ, AVX512BW and AVX512VL
            if saved & _AVX512_STATE == _AVX512_STATE and ebx & 0xC0030000 == 0xC0030000:
                instructions = "AVX-512"
                byte_dot_products |= bool(ecx >> 11 & 1)  # AVX512_VNNI
                if saved & _AMX_STATE == _AMX_STATE and edx >> 24 & 3 == 3:  # AMX-TILE and AMX-INT8
                    instructions = "AMX"
    return Processor(_brand(cpuid), instructions, byte_dot_products)


def _brand(cpuid: _Cpuid) -> str:
    registers = [cpuid.leaf(0x80000002 + part) for part in range(3)]
    text = np.array(registers, np.uint32).tobytes().split(b"\0")[0].decode("ascii", "replace")
    return " ".join(text.split()) or "x86-64"


def _arm64() -> Processor:
    getauxval = ctypes.CDLL(None).getauxval
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    return Processor("arm64", "NEON", bool(getauxval(_AT_HWCAP) & _HWCAP_DOT_PRODUCTS))

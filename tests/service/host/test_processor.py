"""CPUID is interpreted as onnxruntime interprets it."""

from __future__ import annotations

import errno
import os
import platform

import pytest

from service.host import processor as module
from service.host.processor import EXACT_BYTES_OPTION, Processor, byte_options, processor

SAVES_AVX, SAVES_AVX512, SAVES_AMX = 0x7, 0xE7, 0x600E7
AVX = (0, 0, 1 << 28 | 1 << 27 | 1 << 12, 0)
AVX2 = 1 << 5
AVX512 = AVX2 | 1 << 16 | 1 << 17 | 1 << 30 | 1 << 31
AVX512_VNNI = 1 << 11
AMX = 1 << 24 | 1 << 25
AVX_VNNI = 1 << 4
NAME = b"Some Processor   3000".ljust(48, b"\0")


class Registers:
    """A fake processor with the given CPUID leaves; all other leaves are zero."""

    def __init__(self, saved, leaves):
        self.saved_registers = lambda: saved
        self._leaves = {(1, 0): AVX, **leaves}
        for part in range(3):
            words = NAME[16 * part : 16 * part + 16]
            named = tuple(int.from_bytes(words[at : at + 4], "little") for at in range(0, 16, 4))
            self._leaves[0x80000002 + part, 0] = named

    def leaf(self, leaf, subleaf=0):
        return self._leaves.get((leaf, subleaf), (0, 0, 0, 0))


@pytest.mark.parametrize(
    ("saved", "leaves", "instructions", "products"),
    [
        (0, {}, "baseline", False),
        (SAVES_AVX, {}, "AVX", False),
        (SAVES_AVX, {(7, 0): (0, AVX2, 0, 0)}, "AVX2", False),
        (SAVES_AVX, {(7, 0): (1, AVX2, 0, 0), (7, 1): (AVX_VNNI, 0, 0, 0)}, "AVX2", True),
        (SAVES_AVX512, {(7, 0): (0, AVX512, 0, 0)}, "AVX-512", False),
        (SAVES_AVX512, {(7, 0): (0, AVX512, AVX512_VNNI, 0)}, "AVX-512", True),
        (SAVES_AVX512, {(7, 0): (0, AVX512, AVX512_VNNI, AMX)}, "AVX-512", True),
        (SAVES_AMX, {(7, 0): (0, AVX512, AVX512_VNNI, AMX)}, "AMX", True),
        (SAVES_AVX, {(7, 0): (0, AVX512, AVX512_VNNI, 0)}, "AVX2", False),
    ],
    ids=["none", "AVX", "AVX2", "AVX-VNNI", "AVX-512", "VNNI", "AMX unsaved", "AMX", "AVX-512 unsaved"],
)
def test_x86(saved, leaves, instructions, products):
    """Instructions count only where the operating system saves their registers."""
    assert module._x86(Registers(saved, leaves)) == Processor("Some Processor 3000", instructions, products)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="arm64 needs no machine code to read its features")
def test_a_query_that_the_system_forbids(monkeypatch):
    """When the system forbids the query, the processor counts as the baseline, and sums stay exact."""

    def refused(*_):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "memfd_create", refused)
    processor.cache_clear()
    try:
        assert processor() == Processor("x86_64 (unknown: Permission denied)", "baseline", byte_dot_products=False)
        assert byte_options() == {EXACT_BYTES_OPTION: "1"}
    finally:
        monkeypatch.undo()
        processor.cache_clear()


def test_the_printed_form():
    """A processor prints as one line."""
    assert str(Processor("Some", "AVX2", byte_dot_products=False)) == "Some, AVX2 kernels without 8-bit dot products"

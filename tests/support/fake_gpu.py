"""A GPU of the tests' own: the code for CUDA, over memory of the host's and onnxruntime's CPU provider."""

from __future__ import annotations

import ctypes

import numpy as np

from service.engine.ort import device
from service.engine.ort.device import Cuda


class HostDriver:
    """The driver's calls on memory of the host's, apart from what the engine may touch, and a count of bytes moved."""

    name = "host"

    def __init__(self):
        self.memory = {}
        self.host = {}
        self.sent = self.fetched = 0
        self.copies = []

    def free(self):
        return 1 << 40

    def allocate(self, size):
        array = np.zeros(max(1, size), np.uint8)
        self.memory[array.ctypes.data] = array
        return array.ctypes.data

    def host_memory(self, size):
        array = np.full(size, 255, np.uint8)
        self.host[array.ctypes.data] = array
        return array

    def release(self, address, host):
        del self.memory[address]
        self.release_host(host)

    def release_host(self, host):
        del self.host[host.ctypes.data]

    def send(self, target, source):
        self.sent += source.nbytes
        ctypes.memmove(target, source.ctypes.data, source.nbytes)

    def fetch(self, target, source):
        self.fetched += target.nbytes
        ctypes.memmove(target.ctypes.data, source, target.nbytes)

    def copy_rows(self, target, source, *, rows, pitch, width):
        self.copies.append((target, source, rows, pitch, width))

    def wait(self):
        """Copies are done no sooner than they must be."""
        for target, source, rows, pitch, width in self.copies:
            for row in range(rows):
                ctypes.memmove(target + row * pitch, source + row * pitch, width)
        self.copies.clear()


class StandIn(Cuda):
    """All of Cuda but the provider."""

    type = "cpu"

    def __init__(self):
        super().__init__(HostDriver(), 0, 1 << 30)
        self.driver = self._driver
        self.runs = []

    def load(self, graph, threads, *, own_kernels=False):
        return device.Cpu().load(graph, threads, own_kernels=own_kernels)

    def run(self, session, binding, graph):
        self.runs.append((graph, binding))
        super().run(session, binding, graph)

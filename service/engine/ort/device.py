"""The device that runs the model: the processor, or one NVIDIA GPU. All differences are here and in `driver`."""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.engine.ort.driver import Driver
from service.errors import ModelDirectoryError, StartupError
from service.host import kernels
from service.host.processor import byte_options
from service.manifest import KVLayout

Bytes = npt.NDArray[np.uint8]

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
# onnxruntime's bits for flash attention and, on older GPUs, memory-efficient attention. Both read lengths on the GPU,
# as captured graphs require; cuDNN's attention, the default on some GPUs, makes a plan for each shape.
_ATTENTION = 1 | 2
# Linux's number, which Python's mmap has no name for before version 3.13.
_MAP_NORESERVE = 0x4000
# onnxruntime's number for a run that is not captured.
_NOT_CAPTURED = -1


@dataclass(frozen=True, slots=True)
class Block:
    """Memory at an address of a device, and the host's side of it: the same on the CPU, perhaps empty on a GPU.

    `pages` is the mapping behind reserved memory of the host.
    """

    address: int
    host: Bytes
    pages: mmap.mmap | None = None


class Device(Protocol):
    """Runs a model's graphs and holds its tensors. `type` and `index` are onnxruntime's names.

    On a GPU (`is_gpu`) each shape of a call is prepared once, so rows, tokens and logits are padded to few shapes; and
    its memory is not the host's, so what stays there saves a copy.
    """

    type: Literal["cpu", "cuda"]
    index: int
    is_gpu: bool

    def load(self, graph: Path, threads: int, *, own_kernels: bool = False) -> ort.InferenceSession:
        """Loads a graph, which needs our own operators if `own_kernels`.

        Raises ModelDirectoryError when it cannot be loaded.
        """
        ...

    def reserve(self, size: int) -> Block:
        """Allocates `size` zero bytes that only the graphs and `copy_rows` use, for good."""
        ...

    def block(self, size: int) -> Block:
        """Allocates `size` bytes that the host writes and then sends, or fetches and then reads."""
        ...

    def release(self, block: Block) -> None:
        """Frees memory from `block`."""
        ...

    def send(self, block: Block) -> None:
        """Copies a block from the host to the device."""
        ...

    def fetch(self, block: Block, start: int, end: int) -> None:
        """Copies bytes `start`..`end` of a block to the host."""
        ...

    def copy_rows(self, block: Block, source: int, target: int, *, rows: int, pitch: int, width: int) -> None:
        """Copies `width` bytes of each of `rows` rows, `pitch` bytes apart; complete after `wait`.

        `source` and `target` are offsets in bytes, at the start of a row.
        """
        ...

    def discard(self, block: Block, start: int, *, rows: int, pitch: int, kept: int) -> None:
        """Gives memory back: of each of `rows` rows from byte `start` on, `pitch` bytes apart, all but `kept` bytes.

        On the CPU `start`, `pitch` and `kept` are multiples of the page size. A GPU keeps what it has reserved.
        """
        ...

    def wait(self) -> None:
        """Waits for all copies."""
        ...

    def run(self, session: ort.InferenceSession, binding: Any, graph: int | None) -> None:
        """Runs a call and waits for it. Calls with the same `graph` always have the same shapes and addresses."""
        ...


class Cpu:
    """The processor. The operating system provides memory page by page, when it is first written."""

    type: Literal["cpu", "cuda"] = "cpu"
    index = 0
    is_gpu = False

    def load(self, graph: Path, threads: int, *, own_kernels: bool = False) -> ort.InferenceSession:
        options = _options(threads)
        if own_kernels:
            check_kernels(graph.parent)
            kernels.register(options, threads)
        return _session(graph, options, [CPU_PROVIDER])

    def reserve(self, size: int) -> Block:
        # Most of it is never used, so it must not count as used where the system counts what is reserved.
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
        except OSError as error:
            message = f"{size >> 20} MiB of address space for the KV cache are not available ({error.strerror})"
            raise StartupError(f"{message}: raise ulimit -v, or lower memory_mib or context_length") from None
        # With huge pages a slot would take the memory of its full length at once.
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        host = np.frombuffer(memory, np.uint8)
        return Block(host.ctypes.data, host, memory)

    def block(self, size: int) -> Block:
        host = np.zeros(size, np.uint8)
        return Block(host.ctypes.data, host)

    def release(self, block: Block) -> None:
        """Nothing to do: the memory is freed with its last reference."""

    def send(self, block: Block) -> None:
        """Nothing to do: both sides are the same memory."""

    def fetch(self, block: Block, start: int, end: int) -> None:
        """Nothing to do: both sides are the same memory."""

    def copy_rows(self, block: Block, source: int, target: int, *, rows: int, pitch: int, width: int) -> None:
        memory, first, to = block.host.reshape(-1, pitch), source // pitch, target // pitch
        memory[to : to + rows, :width] = memory[first : first + rows, :width]

    def discard(self, block: Block, start: int, *, rows: int, pitch: int, kept: int) -> None:
        assert block.pages is not None, "only reserved memory can be given back"
        if not kept:
            rows, pitch = 1, rows * pitch
        for row in range(rows):
            block.pages.madvise(mmap.MADV_DONTNEED, start + row * pitch + kept, pitch - kept)

    def wait(self) -> None:
        """Nothing to do: copies are complete at once."""

    def run(self, session: ort.InferenceSession, binding: Any, graph: int | None) -> None:
        session.run_with_iobinding(binding)


class Cuda:
    """One GPU. Memory is allocated at once; each graph gets at most `session_bytes` for weights and activations.

    onnxruntime waits for the GPU at the end of every run, so copies need no synchronization with runs.
    """

    type: Literal["cpu", "cuda"] = "cuda"
    is_gpu = True

    def __init__(self, driver: Driver, index: int, session_bytes: int) -> None:
        self.index = index
        self._driver = driver
        self._session_bytes = session_bytes

    def load(self, graph: Path, threads: int, *, own_kernels: bool = False) -> ort.InferenceSession:
        assert not own_kernels, "a manifest with own kernels has only the device cpu"
        options = _options(threads)
        # Otherwise operators that CUDA lacks would run on the CPU, with copies, and no graph could be captured.
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        return _session(graph, options, [(CUDA_PROVIDER, provider_options(self.index, self._session_bytes))])

    def reserve(self, size: int) -> Block:
        return Block(self._driver.allocate(size), np.zeros(0, np.uint8))

    def block(self, size: int) -> Block:
        host = self._driver.host_memory(size)
        host[:] = 0
        try:
            return Block(self._driver.allocate(size), host)
        except StartupError:
            self._driver.release_host(host)
            raise

    def release(self, block: Block) -> None:
        self._driver.release(block.address, block.host)

    def send(self, block: Block) -> None:
        self._driver.send(block.address, block.host)

    def fetch(self, block: Block, start: int, end: int) -> None:
        self._driver.fetch(block.host[start:end], block.address + start)

    def copy_rows(self, block: Block, source: int, target: int, *, rows: int, pitch: int, width: int) -> None:
        places = block.address + target, block.address + source
        self._driver.copy_rows(*places, rows=rows, pitch=pitch, width=width)

    def discard(self, block: Block, start: int, *, rows: int, pitch: int, kept: int) -> None:
        """Nothing to do: the memory stays reserved."""

    def wait(self) -> None:
        self._driver.wait()

    def run(self, session: ort.InferenceSession, binding: Any, graph: int | None) -> None:
        session.run_with_iobinding(binding, run_options(graph))


def provider_options(index: int, session_bytes: int) -> dict[str, str]:
    """The options of onnxruntime's CUDA provider."""
    return {
        "device_id": str(index),
        "gpu_mem_limit": str(session_bytes),
        # By default the arena doubles when it grows, and reaches its limit with half of the memory unused.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
        "use_tf32": "0",
        "sdpa_kernel": str(_ATTENTION),
    }


def run_options(graph: int | None) -> ort.RunOptions:
    """Options of a run that captures `graph` the first time and replays it later; None captures nothing."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(_NOT_CAPTURED if graph is None else graph))
    return options


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that keep spinning after a call would take the cores from the step thread and from other models.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    for name, value in byte_options().items():
        options.add_session_config_entry(name, value)
    return options


def _session(graph: Path, options: ort.SessionOptions, providers: list[Any]) -> ort.InferenceSession:
    try:
        session = ort.InferenceSession(graph, options, providers=providers)
    except Exception as error:  # onnxruntime raises its own unrelated types
        reason = " ".join(str(error).split())
        raise ModelDirectoryError(f"{graph} cannot be loaded by onnxruntime {ort.__version__}: {reason}") from error
    wanted = providers[0] if isinstance(providers[0], str) else providers[0][0]
    if session.get_providers()[0] != wanted:  # onnxruntime only logs when a provider fails to start
        raise ModelDirectoryError(f"{graph} cannot be loaded: onnxruntime did not take its {wanted}")
    return session


def check_kernels(directory: Path) -> None:
    """Raises ModelDirectoryError when a model of our own operators cannot run here, for its directory."""
    if (reason := kernels.why_not()) is not None:
        raise ModelDirectoryError(
            f"{directory} needs our own kernels, which cannot be used here: {reason}; export the model again: python -m"
            f" model_export SOURCE {directory} --kernels stock --overwrite"
        )


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def granule(kv: KVLayout) -> int:
    """How many positions fill whole pages of memory: of one head, or in tiles whole tiles of all heads."""
    position = row_bytes(kv)
    return math.lcm(mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, position), kv.tile)


def row_bytes(kv: KVLayout) -> int:
    """Bytes of a position's keys, or values, in one row of a slot: those of one head, or in tiles of all heads."""
    head = kv.head_dim * np.dtype(kv.dtype).itemsize
    return head if kv.tile == 1 else head * kv.kv_heads


def kv_slots(slots: int, is_gpu: bool) -> int:
    """How many slots the KV cache has for `slots` sequences.

    One more than can be held: a call of a single row is padded with an empty one, so that its bits do not depend on the
    batch. On a GPU, as many as the largest padded call has rows.
    """
    return max(slots + 1, power_of_two(slots)) if is_gpu else slots + 1

"""What computes: the processor, or one NVIDIA GPU. All that differs between them is here, and in the driver's calls."""

from __future__ import annotations

import ctypes
import importlib.metadata
import mmap
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.engine.ort.driver import Driver
from service.errors import ModelDirectoryError, StartupError
from service.host.processor import byte_options

Bytes = npt.NDArray[np.uint8]

CPU_PROVIDER = "CPUExecutionProvider"
CUDA_PROVIDER = "CUDAExecutionProvider"
_CUDA_LIBRARY = "libonnxruntime_providers_cuda.so"
# For onnxruntime: flash attention, and memory-efficient attention where a GPU is too old for it. Both read lengths on
# the GPU, as captured graphs need; cuDNN's, the default on some GPUs, makes a plan of its own for each shape.
_ATTENTION = 1 | 2
# And: this run is no part of any captured graph.
_NOT_CAPTURED = -1


@dataclass(frozen=True, slots=True)
class Block:
    """Memory at a fixed address of a device, and the host's side of it: on the CPU the same memory."""

    address: int
    host: Bytes


class Device(Protocol):
    """Where a model's graphs run and its tensors are. `kind` and `index` are as onnxruntime names them."""

    kind: Literal["cpu", "cuda"]
    index: int
    # Whether calls take few shapes only, since each is prepared once: rows, tokens and logits are padded.
    few_shapes: bool
    # Whether its memory is not the host's, so that what stays there saves a copy.
    apart: bool

    def load(self, graph: Path, threads: int) -> ort.InferenceSession:
        """The graph, ready to run here. Raises ModelDirectoryError when it is not to be loaded."""
        ...

    def reserve(self, size: int) -> Block:
        """So many bytes, all zero, that nobody but the graphs and `copy_rows` touches."""
        ...

    def block(self, size: int) -> Block:
        """So many bytes that the host writes and `send`s, or `fetch`es and reads."""
        ...

    def release(self, block: Block) -> None:
        """Takes a `block` back."""
        ...

    def send(self, block: Block) -> None: ...
    def fetch(self, block: Block, start: int, end: int) -> None:
        """Brings bytes `start`..`end` of a block to the host."""
        ...

    def copy_rows(self, block: Block, source: int, target: int, *, rows: int, pitch: int, width: int) -> None:
        """Copies `width` bytes of each of `rows` rows, `pitch` bytes apart; `wait` ends it.

        The offsets `source` and `target` are of whole rows.
        """
        ...

    def wait(self) -> None:
        """Returns when all copies are done."""
        ...

    def run(self, session: ort.InferenceSession, binding: Any, graph: int | None) -> None:
        """Runs a call and waits for it. Calls of one `graph` have the same shapes and addresses, always."""
        ...


class Cpu:
    """The processor. Memory is taken page by page, when first written."""

    kind: Literal["cpu", "cuda"] = "cpu"
    index = 0
    few_shapes = apart = False

    def load(self, graph: Path, threads: int) -> ort.InferenceSession:
        return _session(graph, _options(threads), [CPU_PROVIDER])

    def reserve(self, size: int) -> Block:
        # A huge page would take a slot's whole length at once.
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            message = f"{size >> 20} MiB of addresses for keys and values cannot be had ({error.strerror}): allow the"
            raise StartupError(f"{message} process more (ulimit -v), or lower memory_mib or context_length") from None
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        return _host_block(np.frombuffer(memory, np.uint8))

    def block(self, size: int) -> Block:
        return _host_block(np.zeros(size, np.uint8))

    def release(self, block: Block) -> None:
        """It goes with its last reference."""

    def send(self, block: Block) -> None:
        """It is there."""

    def fetch(self, block: Block, start: int, end: int) -> None:
        """It is there."""

    def copy_rows(self, block: Block, source: int, target: int, *, rows: int, pitch: int, width: int) -> None:
        memory, of, to = block.host.reshape(-1, pitch), source // pitch, target // pitch
        memory[to : to + rows, :width] = memory[of : of + rows, :width]

    def wait(self) -> None:
        """Nothing is under way."""

    def run(self, session: ort.InferenceSession, binding: Any, graph: int | None) -> None:
        session.run_with_iobinding(binding)


class Cuda:
    """One GPU. All memory is taken at once, and at most `session_bytes` by each graph for weights and activations.

    onnxruntime waits for the GPU at the end of every run: copies before and after need no order of their own.
    """

    kind: Literal["cpu", "cuda"] = "cuda"
    few_shapes = apart = True

    def __init__(self, driver: Driver, index: int, session_bytes: int) -> None:
        self.index = index
        self._driver = driver
        self._session_bytes = session_bytes

    def load(self, graph: Path, threads: int) -> ort.InferenceSession:
        options = _options(threads)
        # Without it, what CUDA lacks would run on the CPU, with copies in between and no graphs.
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

    def wait(self) -> None:
        self._driver.wait()

    def run(self, session: ort.InferenceSession, binding: Any, graph: int | None) -> None:
        session.run_with_iobinding(binding, run_options(graph))


def provider_options(index: int, session_bytes: int) -> dict[str, str]:
    """What onnxruntime's CUDA provider is told."""
    return {
        "device_id": str(index),
        "gpu_mem_limit": str(session_bytes),
        # Else each growth of the arena doubles it, and the limit is reached with half of the memory unused.
        "arena_extend_strategy": "kSameAsRequested",
        "enable_cuda_graph": "1",
        "use_tf32": "0",
        "sdpa_kernel": str(_ATTENTION),
    }


def run_options(graph: int | None) -> ort.RunOptions:
    """A run that is captured when `graph` is run first, and replayed from then on; None captures nothing."""
    options = ort.RunOptions()
    options.add_run_config_entry("gpu_graph_id", str(_NOT_CAPTURED if graph is None else graph))
    return options


def provider(wanted: Literal["auto", "cpu", "cuda"], index: int) -> str:
    """What computes, and on which device. Raises StartupError when it is not there."""
    available = ort.get_available_providers()
    lacking = "" if wanted == "cpu" else lacks_cuda(index)
    if wanted == "cuda" and lacking is not None:
        raise StartupError(no_cuda(lacking))
    if lacking is not None:
        if CPU_PROVIDER not in available:
            raise StartupError(f"onnxruntime {ort.__version__} has no {CPU_PROVIDER}, only {', '.join(available)}")
        why = f"; not CUDA: {lacking}" if lacking and CUDA_PROVIDER in available else ""
        return f"onnxruntime {ort.__version__}, {CPU_PROVIDER}{why}"
    driver = Driver(index)
    return f"onnxruntime {ort.__version__}, {CUDA_PROVIDER} on {driver.name}, {driver.free() >> 20} MiB free"


def no_cuda(lacking: str) -> str:
    """What to say when CUDA is asked for."""
    return f"--device cuda cannot be had: {lacking}"


def lacks_cuda(index: int) -> str | None:
    """What keeps onnxruntime from computing on the GPU of that index; None when nothing does."""
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
    """Which onnxruntime it is that has no CUDA provider."""
    for name in ("onnxruntime-gpu", "onnxruntime"):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        other = "" if name == "onnxruntime-gpu" else "onnxruntime-gpu is not installed: "
        return f"{other}{name} {version} has no {CUDA_PROVIDER}, only {', '.join(ort.get_available_providers())}"
    return f"onnxruntime-gpu is not installed, and onnxruntime {ort.__version__} has no {CUDA_PROVIDER}"


def _missing_library() -> str | None:
    """The library that the provider needs and that is not there, if that is what it is."""
    try:
        ctypes.CDLL(str(Path(ort.__file__).parent / "capi" / _CUDA_LIBRARY))
    except OSError as error:
        return f"{error} (CUDA's libraries come with the extra `gpu`)"
    return None


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that still spin after a call would take the cores from the other graph's next call.
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
    if session.get_providers()[0] != wanted:  # onnxruntime only logs that a provider does not start
        raise ModelDirectoryError(f"{graph} cannot be loaded: onnxruntime did not take its {wanted}")
    return session


def _host_block(memory: Bytes) -> Block:
    return Block(memory.ctypes.data, memory)


def power_of_two(number: int) -> int:
    """The least power of two that is not below."""
    return 1 << max(0, number - 1).bit_length()


def kv_slots(slots: int, few_shapes: bool) -> int:
    """How many slots of keys and values a model has for so many sequences.

    One more than is ever held: a call too narrow for its results to be independent of it is padded with an empty row.
    Where calls take few shapes, as many as the largest.
    """
    return max(slots + 1, power_of_two(slots)) if few_shapes else slots + 1

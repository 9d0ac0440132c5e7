"""The device that runs the model: the processor, or one NVIDIA GPU. All differences are here and in `driver`."""

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
# onnxruntime's bits for flash attention and, on older GPUs, memory-efficient attention. Both read lengths on the GPU,
# as captured graphs require; cuDNN's attention, the default on some GPUs, makes a plan for each shape.
_ATTENTION = 1 | 2
# onnxruntime's number for a run that is not captured.
_NOT_CAPTURED = -1


@dataclass(frozen=True, slots=True)
class Block:
    """Memory at an address of a device, and the host's side of it: the same on the CPU, perhaps empty on a GPU."""

    address: int
    host: Bytes


class Device(Protocol):
    """Runs a model's graphs and holds its tensors. `type` and `index` are onnxruntime's names.

    On a GPU (`is_gpu`) each shape of a call is prepared once, so rows, tokens and logits are padded to few shapes; and
    its memory is not the host's, so what stays there saves a copy.
    """

    type: Literal["cpu", "cuda"]
    index: int
    is_gpu: bool

    def load(self, graph: Path, threads: int) -> ort.InferenceSession:
        """Loads a graph. Raises ModelDirectoryError when it cannot be loaded."""
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

    def load(self, graph: Path, threads: int) -> ort.InferenceSession:
        return _session(graph, _options(threads), [CPU_PROVIDER])

    def reserve(self, size: int) -> Block:
        # With huge pages a slot would take the memory of its full length at once.
        try:
            memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            message = f"{size >> 20} MiB of address space for the KV cache are not available ({error.strerror})"
            raise StartupError(f"{message}: raise ulimit -v, or lower memory_mib or context_length") from None
        memory.madvise(mmap.MADV_NOHUGEPAGE)
        host = np.frombuffer(memory, np.uint8)
        return Block(host.ctypes.data, host)

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

    def load(self, graph: Path, threads: int) -> ort.InferenceSession:
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


def _options(threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    # Threads that keep spinning after a call would slow down the next call of the other graph.
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


def power_of_two(number: int) -> int:
    """The smallest power of two that is at least `number`."""
    return 1 << max(0, number - 1).bit_length()


def kv_slots(slots: int, is_gpu: bool) -> int:
    """How many slots the KV cache has for `slots` sequences.

    One more than can be held: a call of a single row is padded with an empty one, so that its bits do not depend on the
    batch. On a GPU, as many as the largest padded call has rows.
    """
    return max(slots + 1, power_of_two(slots)) if is_gpu else slots + 1

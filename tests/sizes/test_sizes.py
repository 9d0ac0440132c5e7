"""Models of true sizes, with random weights: they start with default settings, run, and stay up.

Prints the figures of docs/sizes.md. SIZES_DIR keeps the files and the exported models, by default in build/sizes.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from statistics import median

import grpc
import pytest
from completion.v1 import completion_pb2 as pb

from bench.processes import memory
from tests.support.measured import taken
from tests.support.patience import PATIENCE, eventually
from tests.support.processes import Service, service
from tests.support.stack import ROOT

pytestmark = [pytest.mark.sizes, pytest.mark.timeout(4 * 3600)]

FOLDER = Path(os.environ.get("SIZES_DIR", ROOT / "build" / "sizes"))
MIB = 1 << 20
# The bounds of the service's own settings, which the tests' patience must not hide here.
DEFAULTS = ("--watchdog-seconds=30", "--max-queue-seconds=30", "--drain-seconds=30")
THREADS = f"--threads={len(os.sched_getaffinity(0))}"


def run(*arguments: object) -> None:
    """Runs a module of this repository, and prints what it took."""
    print(f"{arguments[0]} {arguments[1]}: {taken([sys.executable, '-m', *map(str, arguments)])}")


def exported(shape: str, form: str) -> Path:
    """The model directory of a shape; made where it is missing."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    source, directory = FOLDER / f"{shape}-{form}.gguf", FOLDER / f"{shape}-{form}"
    if not directory.exists():
        if not source.exists():
            run("tests.sizes.random_gguf", shape, form, source)
        run("model_export", source, directory, "--max-kl", 0.05)
    return directory


class Served:
    """A service with one model of a true size, and its figures."""

    def __init__(self, made: Service, model: str) -> None:
        self.service = made
        self.model = model

    def ids(self, count: int) -> pb.Tokens:
        """A prompt of random tokens."""
        return pb.Tokens(ids=random.Random(count).choices(range(1000, 100_000), k=count))

    def complete(self, tokens: int, max_tokens: int) -> pb.CreateCompletionResponse:
        return self.service.complete(3 * PATIENCE, model=self.model, tokens=self.ids(tokens), max_tokens=max_tokens)

    def stream(self, number: int, max_tokens: int) -> list[float]:
        """The times of a stream's pieces, until it ends, or the service at the end of its drain."""
        times: list[float] = []
        pieces = self.service.stream(model=self.model, text=f"hello {number}", max_tokens=max_tokens)
        try:
            times.extend(time.monotonic() for _ in pieces)
        except grpc.RpcError as error:
            if error.code() != grpc.StatusCode.UNAVAILABLE:
                raise
        return times

    def resident(self) -> str:
        """Memory now and at most, in MiB, against what was planned."""
        planned = self.plan["total_mib"]
        now, peak = (memory(self.service.process.pid, field) >> 20 for field in ("VmRSS", "VmHWM"))
        assert peak <= planned, f"{peak} MiB of {planned} planned"
        return f"RSS {now} MiB, peak {peak}, planned {planned}"

    @property
    def plan(self) -> dict[str, int]:
        (line,) = [line for line in self.service.log if "positions" in line]
        return line


@pytest.fixture(
    params=["qwen2.5-0.5b-Q4_0", "qwen2.5-0.5b-Q8_0", "llama-3.2-1b-Q4_0", "llama-3.2-1b-Q8_0", "llama-3.1-8b-Q4_0"]
)
def served(request, tmp_path):
    """Each model, started with default settings."""
    shape, form = request.param.rsplit("-", 1)
    directory = exported(shape, form)
    before = time.monotonic()
    with service(directory, tmp_path, THREADS, *DEFAULTS) as made:
        found = Served(made, shape)
        print(f"\n{request.param}: ready after {time.monotonic() - before:.1f} s, {found.resident()}")
        print({name: value for name, value in found.plan.items() if name not in ("time", "level", "logger", "model")})
        yield found


def test_a_long_prompt_beside_streams(served):
    """Four streams go on while a prompt of 2,000 tokens is computed; then SIGTERM lets what runs finish."""
    with ThreadPoolExecutor(5) as pool:
        streams = [pool.submit(served.stream, number, 400) for number in range(4)]
        eventually(lambda: all(stream.running() for stream in streams))
        alone = time.monotonic()
        served.complete(2, 8)
        begun = time.monotonic()
        served.complete(2000, 1)
        ended = time.monotonic()
        served.service.process.send_signal(signal.SIGTERM)
        pieces = [stream.result() for stream in streams]
        code = served.service.exit_code()
    assert code == 0, served.service.errors
    print(f"prompt of 2000 beside 4 streams: {ended - begun:.1f} s")
    for times in pieces:
        gaps = [(after - before, before) for before, after in pairwise(times)]
        for name, first, last in (("beside one more stream", alone, begun), ("beside the prompt", begun, ended)):
            found = [gap for gap, at in gaps if first <= at < last]
            assert found, f"no token came {name}"
            print(f"  gaps {name}: median {median(found):.3f} s, longest {max(found):.3f} s")


def test_many_callers(served):
    """32 callers at once with prompts of 200 tokens, or 8 short ones of an 8B: all are answered, within the plan."""
    begun, lock, waits = time.monotonic(), threading.Lock(), []
    callers, tokens = (8, 20) if "8b" in served.model else (32, 200)

    def call(number: int) -> None:
        served.complete(tokens + number, 32)
        with lock:
            waits.append(time.monotonic() - begun)

    with ThreadPoolExecutor(callers) as pool:
        for done in [pool.submit(call, number) for number in range(callers)]:
            done.result()
    print(f"{callers} callers: median {median(waits):.1f} s, last {max(waits):.1f} s; {served.resident()}")


def test_a_full_context(tmp_path):
    """A prompt fills a context of 8,192 tokens to the last position, and takes the memory of these."""
    with service(exported("llama-3.2-1b", "Q4_0"), tmp_path, THREADS, *DEFAULTS, "--context-length=8192") as made:
        served = Served(made, "llama-3.2-1b")
        begun, before = time.monotonic(), memory(made.process.pid, "VmRSS")
        served.complete(8190, 2)
        print(f"\nllama-3.2-1b-Q4_0, prompt of 8190: {time.monotonic() - begun:.1f} s; {served.resident()}")
        grown, planned = memory(made.process.pid, "VmRSS") - before, served.plan
        kv = 8192 * planned["kv_mib"] * MIB / planned["positions"]
        print(f"grown by {grown // MIB} MiB, of which the KV cache {kv / MIB:.0f} MiB")
        assert kv < grown < kv + (planned["logits_mib"] + planned["other_mib"]) * MIB

"""The products of our own kernels by themselves, beside what the processor's integer instruction can do."""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

import kernels
from bench.client import PeerError
from bench.limits import best_seconds
from bench.report import Figure, Outcome
from model_export.graph.tiles import TILE_BYTES, TileType
from model_export.native.kernels import DOMAIN
from service.host.kernels import register

# About the largest matrix of the default model's layers, eight times: too large for a core's own cache.
OUTPUTS, INPUTS = 24_576, 576
ROWS = (1, 2, 4, 8, 16, 32, 128)
TYPES: tuple[TileType, ...] = ("Q4_1", "Q8_0")
REPEATS = 15
PEAK_TURNS = 2_000_000
PEAK = "multiply-adds of bytes, by the instruction alone"


def peak(threads: int) -> float:
    """Multiply-adds per second of `threads` threads that do nothing else; the best of REPEATS turns.

    Raises PeerError where our own kernels cannot run.
    """
    if (reason := kernels.why_not()) is not None:
        raise PeerError(reason)
    multiply = ctypes.CDLL(str(kernels.library())).completion_kernels_peak
    multiply.argtypes, multiply.restype = [ctypes.c_uint64], ctypes.c_uint64
    with ThreadPoolExecutor(threads) as pool:
        done = sum(pool.map(multiply, [PEAK_TURNS] * threads))
        return done / best_seconds(lambda: list(pool.map(multiply, [PEAK_TURNS] * threads)), REPEATS)


def measure(threads: int) -> list[Outcome]:
    """For each number of rows: multiply-adds per second of each type of blocks, and their share of the peak."""
    limit, outcomes = peak(threads), []
    sessions = {kind: _session(kind, threads) for kind in TYPES}
    for rows in ROWS:
        figures = [Figure(PEAK, limit / 1e9, "GMAC/s", "")]
        for kind, session in sessions.items():
            done = rows * OUTPUTS * INPUTS / _seconds(session, rows)
            figures.append(Figure(f"products of {kind}", done / 1e9, "GMAC/s", "more"))
            figures.append(Figure(f"products of {kind}, share of that", 100 * done / limit, "%", "more"))
        outcomes.append(Outcome(figures, size=rows))
    return outcomes


def _seconds(session: ort.InferenceSession, rows: int) -> float:
    """The seconds of a product, at best. Its results are not copied."""
    binding = session.io_binding()
    hidden = np.random.default_rng(1).standard_normal((1, rows, INPUTS)).astype(np.float32)
    for name, values in (("hidden", hidden), ("logits_idx", np.arange(rows))):
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(values))
    logits = ort.OrtValue.ortvalue_from_numpy(np.zeros((rows, OUTPUTS), np.float32))
    binding.bind_ortvalue_output("logits", logits)
    return best_seconds(lambda: session.run_with_iobinding(binding), REPEATS)


def _session(kind: TileType, threads: int) -> ort.InferenceSession:
    """A session whose whole work is one product: the output head, with a table of random weights."""
    random = np.random.default_rng(2)
    table = random.integers(0, 256, (OUTPUTS // 32, INPUTS // 32, TILE_BYTES[kind]), np.uint8)
    halves = table[..., 1024 if kind == "Q8_0" else 512 :]
    numbers = random.uniform(0.01, 0.02, (*halves.shape[:-1], halves.shape[-1] // 2))
    halves[:] = numbers.astype(np.float16).view(np.uint8)
    constants = [
        ir.val("norm", const_value=ir.tensor(np.ones(INPUTS, np.float32), name="norm")),
        ir.val("table", const_value=ir.tensor(table, name="table")),
    ]
    hidden = ir.val("hidden", ir.DataType.FLOAT, [1, "positions", INPUTS])
    wanted = ir.val("logits_idx", ir.DataType.INT64, ["rows"])
    node = ir.node("Head", [hidden, *constants, wanted], {"epsilon": 1e-5}, domain=DOMAIN)
    (logits,) = node.outputs
    logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["rows", OUTPUTS])
    graph = ir.Graph(
        [hidden, wanted], [logits], nodes=[node], initializers=constants, opset_imports={"": 21, DOMAIN: 1}
    )
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    register(options, threads)
    model = ir.serde.serialize_model(ir.Model(graph, ir_version=10)).SerializeToString()
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])

"""The machine's limits, memory bandwidth and arithmetic, and how much of both our engine uses."""

from __future__ import annotations

import timeit
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import gguf
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

from bench.report import MACHINE, OURS, Figure, Outcome, Results
from service import manifest

BUFFER_BYTES = 1 << 29
ROWS, COLUMNS, INNER = 512, 2048, 2048
BLOCK = 32
REPEATS = 5
BANDWIDTH = "memory bandwidth, read"
ARITHMETIC = "arithmetic"
# The matrix products: the types that each takes and gives, its operator, and its constant matrices. Level 4 of accuracy
# is that of activations in 8 bits.
BLOCKS = f"com.microsoft.MatMulNBits<K = {INNER}, N = {COLUMNS}, block_size = {BLOCK}, accuracy_level = 4, bits ="
KERNELS = {
    "float32": ("float", "float", "MatMul", ["floats"]),
    "int8 blocks": ("float", "float", f"{BLOCKS} 8>", ["bytes", "scales"]),
    "int4 blocks": ("float", "float", f"{BLOCKS} 4>", ["halves", "scales"]),
    "int8 x uint8": ("uint8", "int32", "MatMulInteger", ["sevens"]),
}


def measure(threads: int) -> Outcome:
    """Reads a buffer much larger than the caches, and multiplies matrices too large to wait for memory."""
    return Outcome(
        [
            Figure(BANDWIDTH, _bandwidth(threads) / 1e9, "GB/s", ""),
            *(
                Figure(f"{ARITHMETIC}, {kernel}", _arithmetic(kernel, threads) / 1e9, "GMAC/s", "")
                for kernel in KERNELS
            ),
        ]
    )


def _bandwidth(threads: int) -> float:
    """Bytes per second that `threads` threads read together, each from its own part of the buffer."""
    parts = np.array_split(np.ones(BUFFER_BYTES // 4, np.float32), threads)
    with ThreadPoolExecutor(threads) as pool:
        return BUFFER_BYTES / best_seconds(lambda: list(pool.map(lambda part: np.dot(part, part), parts)))


def _arithmetic(kernel: str, threads: int) -> float:
    """Multiply-adds per second of one of onnxruntime's matrix products."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    session = ort.InferenceSession(_matrix_product(kernel), options, providers=["CPUExecutionProvider"])
    values = np.random.default_rng(1).integers(0, 100, (ROWS, INNER))
    feed = {"left": values.astype(np.uint8 if KERNELS[kernel][0] == "uint8" else np.float32)}
    return ROWS * COLUMNS * INNER / best_seconds(lambda: session.run(None, feed))


def best_seconds(work: Callable[[], object], repeats: int = REPEATS) -> float:
    """The fastest of `repeats` runs after a first one that does not count: a limit is the best that was reached."""
    return min(timeit.repeat(work, number=1, repeat=1 + repeats)[1:])


def _matrix_product(kernel: str) -> bytes:
    """A model that multiplies its input `left` [ROWS, INNER] with a constant matrix."""
    pick, blocks = np.random.default_rng(2), INNER // BLOCK
    matrices = {
        "floats": pick.random((INNER, COLUMNS), np.float32),
        "bytes": pick.integers(0, 256, (COLUMNS, blocks, BLOCK), np.uint8),
        "halves": pick.integers(0, 256, (COLUMNS, blocks, BLOCK // 2), np.uint8),
        "scales": pick.random((COLUMNS, blocks), np.float32),
        # 7-bit weights, as a product of two bytes must not overflow its 16-bit half sums.
        "sevens": pick.integers(-64, 64, (INNER, COLUMNS), np.int8),
    }
    taken, given, operator, names = KERNELS[kernel]
    text = f"""<ir_version: 10, opset_import: ["": 21, "com.microsoft": 1]>
        graph ({taken}[{ROWS}, {INNER}] left) => ({given}[{ROWS}, {COLUMNS}] product) {{
            product = {operator}(left, {", ".join(names)})
        }}"""
    model = onnx.parser.parse_model(text)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(matrices[name], name) for name in names)
    return model.SerializeToString()


def relate(results: Results, model_dir: Path, weights: Path, options: Namespace) -> None:
    """Adds, for each of our output rates, its share of the machine limits that were measured in the same round.

    A step reads its weights once, for all sequences in it. Arithmetic is only that of the weights: a prompt token
    takes the layers, a generated one the output table as well. Shares are of the fastest kernel that was measured.
    """
    stored = _bytes_per_step(model_dir) / 1e9
    layers, table = _multiply_adds(weights)
    per_token = (layers * (1 + options.prompt_tokens / options.new_tokens) + table) / 1e9
    bandwidths = results.values(("limits", BANDWIDTH), (None, MACHINE))
    kernels = [results.values(("limits", f"{ARITHMETIC}, {kernel}"), (None, MACHINE)) for kernel in KERNELS]
    for peer, concurrency, number in product(OURS, options.concurrency, bandwidths):
        row = (concurrency, peer)
        rates, gaps = (results.values(("closed", name), row) for name in ("output rate", "between tokens, p50"))
        if number in rates:
            shares = {
                "bandwidth": rates[number] / concurrency * stored / bandwidths[number],
                "bandwidth, a step alone": stored / (gaps[number] / 1000) / bandwidths[number],
                "arithmetic": rates[number] * per_token / max(kernel[number] for kernel in kernels),
            }
            figures = [Figure(f"share of the machine's {name}", 100 * share, "%", "") for name, share in shares.items()]
            results.add(number, peer, "limits", Outcome(figures, size=concurrency))


def _bytes_per_step(model_dir: Path) -> int:
    """The bytes of the weights that a decode step multiplies with: all but the embedding table."""
    graph = ir.load(model_dir / manifest.MODEL_FILE).graph
    return sum(
        value.const_value.nbytes
        for value in graph.initializers.values()
        if value.const_value is not None
        and any(not use.node.op_type.startswith(("Gather", "Embedding")) for use in value.uses())
    )


def _multiply_adds(weights: Path) -> tuple[int, int]:
    """Multiply-adds per token in the layers' matrices and in the output table, which may be the embedding's."""
    sizes = {
        tensor.name: int(tensor.n_elements) for tensor in gguf.GGUFReader(weights).tensors if len(tensor.shape) == 2
    }
    layers = sum(size for name, size in sizes.items() if name.startswith("blk."))
    return layers, sizes.get("output.weight", sizes["token_embd.weight"])

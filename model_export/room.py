"""Whether disk and memory have room for an export, by an estimate before it begins. All sizes in bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from model_export.errors import ExportError
from model_export.graph.precision import Precision
from model_export.graph.quantize import PLAIN_FORMS, Form
from model_export.graph.source import Dimensions
from model_export.sources.weights import WEIGHTS_AT_ONCE, threads
from model_export.verify.verify import LOGITS_BYTES
from service.host import memory

MIB = 1 << 20
# The interpreter with its libraries, and for each token of the vocabulary what reading and making the tokenizer took at
# most; the files that are no weights.
PROGRAM, BYTES_PER_TOKEN, SMALL_FILES = 128 * MIB, 800, 16 * MIB
# Arrays of logits in the comparison: its own, and those that onnxruntime makes for them.
ARRAYS_OF_LOGITS = 5
# What a thread has in memory for each weight that it converts.
BYTES_PER_WEIGHT_AT_ONCE = 40
# Bytes per weight: codes, and for each 32 of them a float32 scale and at most a byte of zero point.
_BYTES: dict[Form, float] = {"float32": 4, "float16": 2, "int8": 1 + 5 / 32, "int4": 0.5 + 4.5 / 32}
# The same in the tiles of our own kernels: a float16 scale and minimum, or a scale.
_BYTES_IN_TILES: dict[Form, float] = {"int4": 0.5 + 4 / 32, "int8": 1 + 2 / 32}


def check_room(dimensions: Dimensions, precision: Precision, directory: Path) -> None:
    """Raises ExportError where the disk of `directory` or the memory has too little room."""
    graph = graph_bytes(dimensions, precision)
    existing = next(parent for parent in directory.absolute().parents if parent.exists())
    _check(f"{existing}: the export takes", graph + SMALL_FILES, "disk", shutil.disk_usage(existing).free)
    _check("the export takes", memory_needed(dimensions, precision), "memory", memory.free())


def memory_needed(dimensions: Dimensions, precision: Precision) -> int:
    """The most memory of its own that an export takes, about, without pages of files."""
    parts = min(dimensions.layer_weights, threads() * WEIGHTS_AT_ONCE) * BYTES_PER_WEIGHT_AT_ONCE
    building = _largest(dimensions, precision) + parts
    # onnxruntime keeps its own copy of a graph's matrices; what it maps from the files can be given up at any time.
    logits = min(LOGITS_BYTES, 4 * dimensions.vocab_size * dimensions.context_length)
    # Our own kernels read them where they are mapped.
    copies = 0 if precision.kernels == "own" else graph_bytes(dimensions, precision)
    verifying = copies + ARRAYS_OF_LOGITS * logits
    return PROGRAM + BYTES_PER_TOKEN * dimensions.vocab_size + max(building, verifying)


def _check(what: str, needed: int, kind: str, free: int) -> None:
    if needed > free:
        raise ExportError(f"{what} about {needed / MIB:.0f} MiB of {kind}, and {free / MIB:.0f} MiB are free")


def graph_bytes(dimensions: Dimensions, precision: Precision) -> int:
    """The size of a graph, about; without the tables where their sizes are not known."""
    table, hidden = dimensions.table_weights, dimensions.hidden_size
    floats = 2 if precision.activations == "float16" else 4
    own = precision.kernels == "own"
    layers = dimensions.layer_weights * (_BYTES_IN_TILES if own else _BYTES)[precision.form]
    if precision.form in PLAIN_FORMS:
        tables = table * floats * (1 if dimensions.tied_embedding else 2)
    elif own or precision.activations == "float16":
        per_weight = _BYTES_IN_TILES[precision.form] if own else _BYTES["int8"]
        tables = int(table * per_weight) * (1 if dimensions.tied_embedding else 2)
    else:  # for look-ups in blocks, for products a byte for each weight, after a product that mixes the columns
        tables = int(table * (_BYTES["int8"] + 1)) + hidden * hidden * floats
    rotations = 2 * dimensions.context_length * dimensions.rotary_pairs * floats
    return int(layers) + tables + rotations


def _largest(dimensions: Dimensions, precision: Precision) -> int:
    """The size of the largest matrix that is stored in a graph."""
    table = _BYTES[precision.form if precision.form in PLAIN_FORMS else "int8"]
    return int(max(dimensions.table_weights * table, dimensions.largest_matrix * _BYTES[precision.form]))

"""Whether disk and memory have room for an export, by an estimate before it begins. All sizes in bytes."""

from __future__ import annotations

import shutil
from pathlib import Path

from model_export.errors import ExportError
from model_export.graph.operators import LinearForm
from model_export.graph.precision import Precision
from model_export.graph.quantize import PLAIN_FORMS
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
_BYTES: dict[LinearForm, float] = {
    "float32": 4,
    "float16": 2,
    "int8": 1 + 5 / 32,
    "int4": 0.5 + 5 / 32 + 1 / 16,  # and the remainders of their blocks
    "int8_rows": 1,
}
# The same in the tiles of our own kernels: a float16 scale and minimum, or a scale.
_BYTES_IN_TILES: dict[LinearForm, float] = {"int4": 0.5 + 4 / 32, "int8": 1 + 2 / 32}


def check_room(
    dimensions: Dimensions, precision: Precision, prefill_form: LinearForm | None, source: str, directory: Path
) -> None:
    """Raises ExportError where the disk of `directory` or the memory has too little room.

    `source` is the form of the source's matrices. There is a prefill graph if `prefill_form` is not None.
    """
    form = decode_form(precision, source)
    decode = graph_bytes(dimensions, precision, form)
    prefill = 0 if prefill_form is None else graph_bytes(dimensions, precision, prefill_form)
    existing = next(parent for parent in directory.absolute().parents if parent.exists())
    _check(f"{existing}: the export takes", decode + prefill + SMALL_FILES, "disk", shutil.disk_usage(existing).free)
    _check("the export takes", memory_needed(dimensions, precision, prefill_form, source), "memory", memory.free())


def memory_needed(dimensions: Dimensions, precision: Precision, prefill_form: LinearForm | None, source: str) -> int:
    """The most memory of its own that an export takes, about, without pages of files; see `check_room`."""
    form = decode_form(precision, source)
    forms = [form] if prefill_form is None else [form, prefill_form]
    parts = min(dimensions.layer_weights, threads() * WEIGHTS_AT_ONCE) * BYTES_PER_WEIGHT_AT_ONCE
    building = max(_largest(dimensions, precision, each) for each in forms) + parts
    # onnxruntime keeps its own copy of a graph's matrices; what it maps from the files can be given up at any time.
    logits = min(LOGITS_BYTES, 4 * dimensions.vocab_size * dimensions.context_length)
    # Our own kernels read them where they are mapped.
    copies = 0 if precision.kernels == "own" else max(graph_bytes(dimensions, precision, each) for each in forms)
    verifying = copies + ARRAYS_OF_LOGITS * logits
    return PROGRAM + BYTES_PER_TOKEN * dimensions.vocab_size + max(building, verifying)


def _check(what: str, needed: int, kind: str, free: int) -> None:
    if needed > free:
        raise ExportError(f"{what} about {needed / MIB:.0f} MiB of {kind}, and {free / MIB:.0f} MiB are free")


def decode_form(precision: Precision, source: str) -> LinearForm:
    """The form that most matrices of the layers take in the decode graph."""
    if precision.form == "int4-int8":
        return "int4" if source in ("Q4_0", "Q4_1") else "int8"
    return precision.form


def graph_bytes(dimensions: Dimensions, precision: Precision, form: LinearForm) -> int:
    """The size of a graph whose layers are in `form`, about; without the tables where their sizes are not known."""
    table, hidden = dimensions.table_weights, dimensions.hidden_size
    floats = 2 if precision.activations == "float16" else 4
    sizes = _BYTES_IN_TILES if precision.kernels == "own" else _BYTES
    if precision.form in PLAIN_FORMS:
        tables = table * floats * (1 if dimensions.tied_embedding else 2)
    elif precision.activations == "float16" or precision.kernels == "own":
        tables = int(table * sizes["int8"]) * (1 if dimensions.tied_embedding else 2)
    else:
        tables = int(table * (_BYTES["int8"] + _BYTES["int8_rows"])) + hidden * hidden * floats
    rotations = 2 * dimensions.context_length * dimensions.rotary_pairs * floats
    layers = int(dimensions.layer_weights * sizes[form])
    if form == "int8_rows":  # most of the last layer stays in float32, see Operators.linear
        layers += 3 * dimensions.layer_weights // dimensions.layers
    return layers + tables + rotations


def _largest(dimensions: Dimensions, precision: Precision, form: LinearForm) -> int:
    """The size of the largest matrix that is stored in a graph whose layers are in `form`."""
    table = _BYTES[precision.form if precision.form in PLAIN_FORMS else "int8"]
    return int(max(dimensions.table_weights * table, dimensions.largest_matrix * _BYTES[form]))

"""Tries, at the start, whether onnxruntime computes a row in the same way alone and among others, on this processor.

A small graph in the model directory holds some of the model's own products, cut to few columns.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from service.engine.ort.device import Device
from service.errors import ModelDirectoryError, StartupError
from service.manifest import SELF_TEST_FILE

Floats = npt.NDArray[np.floating]

# Numbers of rows that share a decode step, and a prompt, with the place where it is cut.
_COMPANY = (2, 3, 8, 32)
_PROMPT, _CUT = 160, 62
_MOST_COLUMNS = 1 << 20


def lone_row_differs(directory: Path, device: Device, threads: int) -> bool:
    """Whether a lone row has other bits than the same row among others, so that it has to be padded to two.

    Raises StartupError where rows among others differ too, which padding does not mend, and ModelDirectoryError where
    the graph is not what an export writes.
    """
    graph = directory / SELF_TEST_FILE
    session = device.load(graph, threads)
    rows = np.random.default_rng(0).standard_normal((_PROMPT, _columns(graph, session)), np.float32)

    def products(part: npt.NDArray[np.float32]) -> list[Floats]:
        try:
            found: list[Floats] = session.run(None, {"rows": part})
        except Exception as error:  # onnxruntime raises its own unrelated types
            raise ModelDirectoryError(f"{graph} cannot be run by onnxruntime {ort.__version__}: {error}") from error
        return found

    whole = products(rows)
    for count in _COMPANY:
        if not _equal(products(rows[:count]), whole, count):
            raise StartupError(_refusal(directory, f"{count} rows in another way than {_PROMPT}"))
    parts = zip(products(rows[:_CUT]), products(rows[_CUT:]), strict=True)
    if not _equal([np.concatenate(pair) for pair in parts], whole, _PROMPT):
        raise StartupError(_refusal(directory, f"a prompt of {_PROMPT} tokens in another way if cut after {_CUT}"))
    return not _equal(products(rows[:1]), whole, 1)


def _equal(found: list[Floats], whole: list[Floats], rows: int) -> bool:
    return all(np.array_equal(one, other[:rows]) for one, other in zip(found, whole, strict=True))


def _refusal(directory: Path, how: str) -> str:
    return (
        f"{directory}: onnxruntime {ort.__version__} computes {how} on this processor, so answers would depend on the"
        " load; allow that by the setting batch_invariant (--no-batch-invariant), or export the model in another form"
        " (--quantization)"
    )


def _columns(graph: Path, session: ort.InferenceSession) -> int:
    """How many columns the graph's one input has."""
    declared = session.get_inputs()
    if [(value.name, value.type, len(value.shape)) for value in declared] == [("rows", "tensor(float)", 2)]:
        columns = declared[0].shape[1]
        if isinstance(columns, int) and 0 < columns <= _MOST_COLUMNS:
            return columns
    raise ModelDirectoryError(f"{graph} has other inputs than rows, float32 with at most {_MOST_COLUMNS} columns")

"""Checks, when a graph is loaded, that its inputs and outputs are those that its manifest describes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

from service.errors import ModelDirectoryError
from service.manifest import Manifest

_TYPES = {"float32": "tensor(float)", "float16": "tensor(float16)"}

# A type and a shape; a size of None may be anything.
_Value = tuple[str, tuple[int | None, ...]]


class Declared(Protocol):
    """An input or output as a graph declares it; sizes that are not fixed are names or None."""

    @property
    def name(self) -> str: ...
    @property
    def type(self) -> str: ...
    @property
    def shape(self) -> list[int | str | None]: ...


def check_signature(graph: Path, inputs: Iterable[Declared], outputs: Iterable[Declared], manifest: Manifest) -> None:
    """Raises ModelDirectoryError unless `graph` has the inputs and outputs of docs/model-directory.md."""
    kv = manifest.kv
    part = (_TYPES[kv.dtype], (None, kv.kv_heads, None, kv.head_dim))
    names = [f"{half}.{layer}" for layer in range(kv.layers) for half in ("key", "value")]
    wanted: dict[str, _Value] = {
        "input_ids": ("tensor(int64)", (None, None)),
        "seqlens_k": ("tensor(int32)", (None,)),
        "total_sequence_length": ("tensor(int32)", (1,)),
        "logits_idx": ("tensor(int64)", (None,)),
    }
    declared = {value.name: value for value in inputs}
    # Only onnxruntime's attention for GPUs has no such input.
    if kv.dtype == "float32" or manifest.kernels == "own" or "query_seqlens" in declared:
        wanted["query_seqlens"] = ("tensor(int32)", (None,))
    _check(graph, "input", declared, wanted | dict.fromkeys([f"past_{name}" for name in names], part))
    if unknown := sorted(declared.keys() - wanted.keys() - {f"past_{name}" for name in names}):
        raise ModelDirectoryError(f"{graph} has an input {unknown[0]!r}, which the manifest does not describe")
    logits = ("tensor(float)", (None, manifest.vocab_size))
    results = {value.name: value for value in outputs}
    _check(graph, "output", results, {"logits": logits} | dict.fromkeys([f"present_{name}" for name in names], part))


def _check(graph: Path, what: str, values: Mapping[str, Declared], wanted: Mapping[str, _Value]) -> None:
    for name, (dtype, shape) in wanted.items():
        if name not in values:
            raise ModelDirectoryError(f"{graph} has no {what} {name}, which the manifest implies")
        declared = values[name]
        sizes = zip(declared.shape, shape, strict=False)
        fits = len(declared.shape) == len(shape) and all(
            size == expected for size, expected in sizes if expected is not None and isinstance(size, int)
        )
        if declared.type != dtype or not fits:
            is_this = f"{declared.type} of shape {_shown(declared.shape)}"
            raise ModelDirectoryError(
                f"{graph}: {what} {name} is {is_this}, but the manifest implies {dtype} of shape {_shown(shape)}"
            )


def _shown(shape: Iterable[int | str | None]) -> str:
    return "[" + ", ".join(str(size) if isinstance(size, int) else "?" for size in shape) + "]"

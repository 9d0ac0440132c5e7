"""Files of a source, which are opened only if they are plain files within the source."""

from __future__ import annotations

import json
import os.path
from pathlib import Path
from typing import Any

from model_export.errors import ExportError

MIB = 1 << 20
# How files begin that stand in a model's place, and what they are.
LOOKS_LIKE = {
    b"version https://git-lfs": "a Git LFS pointer: fetch the file itself with `git lfs pull`",
    b"<!DOCTYPE": "a web page",
    b"<!doctype": "a web page",
    b"<html": "a web page",
    b"GGUF": "a GGUF file, which is a source itself",
    b"FUGG": "a big-endian GGUF file",
    b"PK\x03\x04": "a zip archive, perhaps a pickle, which may run any code when it is read",
    b"\x80": "a pickle, which may run any code when it is read",
    b"ggml": "a file from before GGUF",
    b"ggjt": "a file from before GGUF",
}


def looks_like(path: Path) -> str:
    """What an error message adds where the beginning of the file tells what it is instead; else an empty text."""
    with path.open("rb") as file:
        head = file.read(32)
    kind = next((kind for start, kind in LOOKS_LIKE.items() if head.startswith(start)), None)
    if head[8:9] == b"{":
        kind = "a safetensors file, whose directory is the source"
    return f"; it looks like {kind}" if kind else ""


def plain_file(directory: Path, name: str, largest: int | None = None) -> Path:
    """The path of the file `name` of `directory`.

    Raises ExportError where the path leads out of the directory, where it is no plain file (opening a pipe could
    block), or where the file has more than `largest` bytes.
    """
    path = directory / name
    home, target = Path(os.path.realpath(directory)), Path(os.path.realpath(path))
    # The files of `directory`, a snapshot of the Hugging Face cache, are links to blobs beside the snapshots.
    is_blob = home.parent.name == "snapshots" and target.parent == home.parent.parent / "blobs"
    if not target.is_relative_to(home) and not is_blob:
        raise ExportError(f"{path} leads out of {directory}; refusing to read it")
    if not path.exists():
        raise ExportError(f"{path} does not exist")
    if not path.is_file():
        raise ExportError(f"{path} is not a plain file")
    size = path.stat().st_size
    if largest is not None and size > largest:
        raise ExportError(f"{path} has {size} bytes, expected at most {largest}")
    return path


def read_json(directory: Path, name: str, largest: int = 16 * MIB) -> dict[str, Any]:
    """The JSON object in the file `name` of `directory`. Raises ExportError where there is none."""
    path = plain_file(directory, name, largest)
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise ExportError(f"{path} is nested too deeply") from None
    except ValueError as error:
        raise ExportError(f"{path} is not JSON: {error}{looks_like(path)}") from error
    if not isinstance(value, dict):
        raise ExportError(f"{path} does not hold a JSON object")
    return value

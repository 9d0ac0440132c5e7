"""The fingerprint of all that decides the bits of a model's answers."""

from __future__ import annotations

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

import service
from service.engine.ort.availability import runtime
from service.host import kernels
from service.host.processor import byte_options, processor
from service.manifest import Manifest
from service.settings import Settings

# The packages whose code chooses tokens and makes texts of them, beside the model itself.
_CODE = ("engine", "text")


def parts(manifest: Manifest, settings: Settings) -> dict[str, Any]:
    """What decides the bits, by kind; `settings` are the model's own, its device chosen."""
    cpu = processor()
    return {
        "model": manifest.model_dump(mode="json", include={"files", "special_tokens", "vocab_size", "kv"}),
        "kernels": {
            "device": settings.device,
            "processor": [cpu.instructions, cpu.byte_dot_products],
            "options": byte_options(),
            "operators": [manifest.kernels, *(kernels.identity() if manifest.kernels == "own" else [])],
            "numpy": sorted(np.show_config(mode="dicts")["SIMD Extensions"].get("found", ())),
        },
        "runtime": {"onnxruntime": runtime()} | {name: version(name) for name in ("numpy", "tokenizers")},
        "settings": {name: getattr(settings, name) for name in ("batch_invariant", "prompt_chunk", "threads")},
        "code": _code(),
    }


def fingerprint(kinds: dict[str, Any]) -> str:
    """`fp_` and 20 hexadecimal digits: equal for equal parts, and for no others."""
    text = json.dumps(kinds, sort_keys=True)
    return f"fp_{hashlib.sha256(text.encode()).hexdigest()[:20]}"


def _code() -> str:
    """A hash of the service's own code."""
    root = Path(service.__file__).parent
    found = hashlib.sha256()
    for path in sorted(path for package in _CODE for path in (root / package).rglob("*.py")):
        content = path.read_bytes()
        found.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return found.hexdigest()

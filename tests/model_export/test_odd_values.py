"""Every entry of a configuration, and every key of a GGUF file, with values that it should not have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Value

from model_export import gguf_config, gguf_keys, hf_config
from model_export.errors import ExportError
from model_export.families import OWN
from model_export.hf_check import NUMBERS, OPTIONAL, ROTARY
from model_export.opening import read_source
from tests.model_export import tiny
from tests.model_export.bad_sources import Gguf, array, value, whole

ODD: list[Any] = [0, -1, 1, 5, 10**30, 0.5, 1e300, float("nan"), True, None, "x", [], [{}], [[1], "x"], {}, {"a": {}}]
PLAIN = {"rope_type": "default"}
ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 48},
    "longrope": {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 48},
}
WINDOWED = {"sliding_window": 24, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]}
# What is read of a configuration of each family: all that its entries can lead to.
LLAMAS = {name: tiny.config("llama", rope_scaling={"rope_type": name, **more}) for name, more in ROTATIONS.items()}
CONFIGS = (
    {family: tiny.config(family) for family in OWN}
    | {f"{family}, windows": tiny.config(family, **WINDOWED) for family in OWN}
    | {
        f"{family}, windows by rule": tiny.config(family, **WINDOWED, layer_types=None)
        for family in ("qwen2", "smollm3")
    }
    | LLAMAS
    | {"phi3, longrope": tiny.config("phi3", rope_scaling={"rope_type": "longrope", **ROTATIONS["longrope"]})}
)


def read(source: Path) -> str:
    """Reads a source; the sentence by which it is refused, or nothing."""
    try:
        read_source(source)
    except ExportError as error:
        assert source.name in str(error)
        assert str(error).isprintable()
        return str(error)
    return ""


def changes(config: dict[str, Any]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each entry, an odd value, and the configuration with that; the rotation's entries are behind a dot."""
    for name in {**NUMBERS, **OPTIONAL}:
        for odd in ODD:
            yield name, odd, config | {name: odd}
    scaling = config.get("rope_scaling")
    for name in ROTARY if scaling else ():
        for odd in ODD:
            yield f"rope_scaling.{name}", odd, config | {"rope_scaling": scaling | {name: odd}}


@pytest.mark.parametrize("case", CONFIGS)
def test_odd_entries(case: str, tmp_path: Path) -> None:
    """A configuration with one odd entry is read, or refused in one sentence; by its name where the kind is wrong."""
    config = CONFIGS[case]
    source = tiny.hugging_face(tmp_path / "Tiny", config["model_type"])
    for name, odd, changed in changes(config):
        (source / "config.json").write_text(json.dumps(changed))
        refusal = read(source)
        kind = {**NUMBERS, **OPTIONAL, **ROTARY}[name.rpartition(".")[2]]
        if not kind.holds(odd) and (odd is not None or name in NUMBERS):
            assert f"{name} is " in refusal, (name, odd)

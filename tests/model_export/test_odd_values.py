"""Every entry of a configuration, and every key of a GGUF file, with values that it should not have."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFValueType as Value
from pydantic import BaseModel, ValidationError

from model_export.errors import ExportError
from model_export.opening import read_source
from model_export.sources.families import NATIVE
from model_export.sources.gguf import config as gguf_config
from model_export.sources.gguf import keys as gguf_keys
from model_export.sources.hugging_face.config import Config, Rotation, TokenIds
from tests.model_export import tiny
from tests.model_export.gguf_files import Gguf, array, value, whole

ODD: list[Any] = [0, -1, 1, 5, 10**30, 0.5, 1e300, float("nan"), True, None, "x", [], [{}], [[1], "x"], {}, {"a": {}}]
ROTATIONS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 4.0},
    "dynamic": {"factor": 4.0},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 48},
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 48},
    "longrope": {"short_factor": [1.0] * 16, "long_factor": [2.0] * 16, "original_max_position_embeddings": 48},
}
ROTATION = [name for name in Rotation.model_fields if name != "by_layer_type"]
BY_RULE = {"sliding_window": 24, "use_sliding_window": True}
WINDOWED = BY_RULE | {"layer_types": ["full_attention", "sliding_attention"]}
# Configurations that together use every entry of each family.
LLAMAS = {name: tiny.config("llama", rope_scaling={"rope_type": name, **more}) for name, more in ROTATIONS.items()}
CONFIGS = (
    {family: tiny.config(family) for family in NATIVE}
    | {f"{family}, windows": tiny.config(family, **WINDOWED) for family in NATIVE}
    | {f"{family}, windows by rule": tiny.config(family, **BY_RULE) for family in ("qwen2", "smollm3")}
    | LLAMAS
    | {"phi3, longrope": tiny.config("phi3", rope_scaling={"rope_type": "longrope", **ROTATIONS["longrope"]})}
)


def read(source: Path) -> str:
    """Reads a source; returns the error message, or an empty text."""
    try:
        read_source(source)
    except ExportError as error:
        refusal = str(error)
    else:
        return ""
    assert source.name in refusal
    assert refusal.isprintable()
    return refusal


def holds(model: type[BaseModel], name: str, value: Any) -> bool:
    """Whether the entry may have that value."""
    try:
        model.model_validate({name: value})
    except ValidationError:
        return False
    return True


def entries(case: str) -> list[str]:
    """The entries that mean something else in this configuration than in its family's plain one."""
    if "windows" in case:
        return [name for name in Config.model_fields if "window" in name or "layer" in name]
    if case in ROTATIONS or "longrope" in case:
        return [name for name in Config.model_fields if "rope" in name or "position" in name or "rotary" in name]
    return list(Config.model_fields)


def changes(config: dict[str, Any], names: Iterable[str]) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Each entry, an odd value, and the configuration with it; names of the scaling's entries contain a dot."""
    for name in names:
        for odd in ODD:
            yield name, odd, config | {name: odd}
    scaling = config.get("rope_scaling")
    for name in ROTATION if scaling else ():
        for odd in ODD:
            yield f"rope_scaling.{name}", odd, config | {"rope_scaling": scaling | {name: odd}}


@pytest.mark.parametrize(
    ("case", "names"),
    [(case, entries(case)) for case in CONFIGS]
    + [pytest.param(case, list(Config.model_fields), marks=pytest.mark.slow, id=f"{case}, all") for case in CONFIGS],
    ids=lambda given: given if isinstance(given, str) else "",
)
def test_odd_entries(case: str, names: list[str], tmp_path: Path) -> None:
    """A configuration with one odd entry is read, or refused in one sentence that names an entry of the wrong type."""
    config = CONFIGS[case]
    source = tiny.hugging_face(tmp_path / "Tiny", config["model_type"])
    for name, odd, changed in changes(config, names):
        (source / "config.json").write_text(json.dumps(changed))
        refusal = read(source)
        part, _, entry = name.rpartition(".")
        if not holds(Rotation if part else Config, entry, odd):
            assert f"{name} is " in refusal, (name, odd)


@pytest.mark.parametrize("model", [Config, Rotation, TokenIds])
def test_no_entry_is_read_unchecked(model: type[BaseModel]) -> None:
    """The architecture is read only from these entries, and none of them accepts every value."""
    for name in model.model_fields.keys() - {"by_layer_type"}:
        assert not all(holds(model, name, odd) for odd in ODD), name


# Odd values of a key, and a few that are valid for some key.
ODD_VALUES = [
    *(value(Value.UINT32, number) for number in (0, 1, 5, 2**32 - 1)),
    *(value(Value.INT32, number) for number in (-1, 4)),
    *(value(Value.FLOAT32, number) for number in (0.0, -1.0, 0.5, 3e38, float("nan"), float("inf"))),
    *(value(Value.BOOL, flag) for flag in (False, True)),
    value(Value.UINT64, 2**63),
    value(Value.STRING, "x"),
    value(Value.STRING, ""),
    array(Value.UINT32, []),
    array(Value.UINT32, [4, 4]),
    array(Value.STRING, ["x"]),
]
SCALING = ("type", "factor", "original_context_length")
SCALINGS = {"": (), "linear": ("linear", 4.0), "yarn": ("yarn", 4.0, 48)}


def file(family: str, scaling: str) -> Gguf:
    """The tiny model as one of `family`, with this scaling of the rotary embedding."""
    made = whole()
    made.keys = [(str(name).replace("llama.", f"{family}."), raw) for name, raw in made.keys]
    made.set("general.architecture", value(Value.STRING, family))
    kinds = {str: Value.STRING, float: Value.FLOAT32, int: Value.UINT32}
    for name, content in zip(SCALING, SCALINGS[scaling], strict=False):
        made.set(f"{family}.rope.scaling.{name}", value(kinds[type(content)], content))
    return made


PREFIXED = (*gguf_keys.NUMBERS, *gguf_config.SUPPORTED)
ROTATION_KEYS = [name for name in PREFIXED if name.startswith("rope.")]
# The keys to change, by family: keys without a family once, keys of the rotary embedding for each scaling.
FILES = {
    "llama": ("llama", "", [*gguf_keys.KEYS, *gguf_keys.IDS, *(f"llama.{name}" for name in PREFIXED)]),
    "linear": ("llama", "linear", [f"llama.{name}" for name in ROTATION_KEYS]),
    "yarn": ("qwen2", "yarn", [f"qwen2.{name}" for name in ROTATION_KEYS]),
    "smollm3": ("smollm3", "", [f"smollm3.{name}" for name in gguf_keys.NUMBERS]),
    "phi3": ("phi3", "", [f"phi3.{name}" for name in gguf_keys.NUMBERS]),
}


@pytest.mark.parametrize("case", FILES)
def test_odd_keys(case: str, tmp_path: Path) -> None:
    """A file with one odd key is read, or refused in one sentence."""
    family, scaling, names = FILES[case]
    source, good = tmp_path / "Tiny.gguf", file(family, scaling)
    for name in names:
        for odd in ODD_VALUES:
            made = replace(good, keys=list(good.keys))
            made.set(name, odd)
            source.write_bytes(made.encode())
            read(source)


@pytest.mark.parametrize("key", gguf_keys.IDS)
def test_tokens_beyond(key: str, tmp_path: Path) -> None:
    """A special token outside the vocabulary is refused before anything is built."""
    source = tmp_path / "Tiny.gguf"
    made = whole()
    made.set(key, value(Value.UINT32, tiny.VOCAB))
    source.write_bytes(made.encode())
    assert f"{key} is {tiny.VOCAB}, expected a whole number within 0..{tiny.VOCAB - 1}" in read(source)

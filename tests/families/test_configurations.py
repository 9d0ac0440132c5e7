"""What each entry of config.json means, and what its absence does, by transformers; or the model is refused."""

from __future__ import annotations

import functools
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from huggingface_hub.errors import StrictDataclassError
from safetensors.numpy import load_file, save_file

from model_export.errors import ExportError
from model_export.opening import read_source
from model_export.sources.families import NATIVE
from model_export.sources.hugging_face.config import Config as Known
from model_export.sources.hugging_face.config import Scaling
from tests.families.families import FAMILIES, WIDE
from tests.families.family import Family
from tests.families.oracle import Oracle, make

pytestmark = pytest.mark.families

Config = dict[str, Any]
Edit = Callable[[Config], object]
BUILT = {family.name: family for family in FAMILIES if family.config["model_type"] in NATIVE}
MADE = BUILT | {"phi3-wide": Family("phi3-wide", {"model_type": "phi3"}, sizes=WIDE)}
# The exporter needs these entries, even where transformers has a default.
REQUIRED = {
    *("model_type", "num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "vocab_size"),
    "max_position_embeddings",
}
ROTARIES = ("rope_parameters", "rope_scaling")
TOKENS = 100
# Entries that transformers invents, ignores, or uses in only some of its attention functions.
TAKEN_OTHERWISE = re.compile("has no tensor|model does not have|no sliding_window is in use")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a family, made once."""

    @functools.cache
    def make_once(name: str) -> Path:
        return make(MADE[name], tmp_path_factory.mktemp(name) / "source")

    return make_once


def edited(source: Path, target: Path, edit: Edit) -> Path:
    """A copy of a directory with another configuration."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text())
    edit(config)
    (target / "config.json").write_text(json.dumps(config))
    return target


def logprobs(source: Path) -> np.ndarray:
    """The logits that the exporter computes for a text."""
    logits = read_source(source).logits(np.arange(TOKENS), int)
    logits -= logits.max(axis=-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def check(source: Path) -> None:
    """The exporter computes the same logits as transformers, which therefore can load the model."""
    expected = Oracle(source).continuation(list(range(TOKENS)), 1).logprobs
    np.testing.assert_allclose(logprobs(source), expected[:TOKENS], atol=1e-3, rtol=0)


def without(config: Config, name: str) -> bool:
    """Removes the entry `name`, in which a dot leads into an object. Returns whether it was there."""
    part, _, entry = name.rpartition(".")
    place = (config.get(part) or {}) if part else config
    return place.pop(entry, config) is not config


NAMES = [*Known.model_fields, *(f"{part}.{name}" for part in ROTARIES for name in Scaling.model_fields)]


@pytest.mark.parametrize("family", BUILT)
def test_what_is_left_out(family: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """A missing entry has the same default as in transformers, or both refuse the model."""
    source = made(family)
    config = (source / "config.json").read_text()
    names = [name for name in NAMES if without(json.loads(config), name)]
    assert set(names) > REQUIRED
    for name in names:
        changed = edited(source, tmp_path / name, functools.partial(without, name=name))
        try:
            read_source(changed)
        except ExportError as error:
            refusal = str(error)
        else:
            check(changed)
            continue
        if name in REQUIRED:
            assert f"has no {name}" in refusal or "architecture None is not supported" in refusal
        elif not TAKEN_OTHERWISE.search(refusal):
            with pytest.raises((RuntimeError, KeyError, TypeError, ValueError, StrictDataclassError)):
                Oracle(changed).continuation(list(range(TOKENS)), 1)


def setting(**entries: Any) -> Edit:
    """Sets entries."""
    return lambda config: config.update(entries)


def rotary_of_old(theta: float | None = None, **scaling: Any) -> Edit:
    """Describes the rotary embedding as older configurations do, without `rope_parameters`."""

    def edit(config: Config) -> None:
        without(config, "rope_parameters")
        config.update({"rope_scaling": scaling} if scaling else {})
        config.update({} if theta is None else {"rope_theta": theta})

    return edit


def rotary(**entries: Any) -> Edit:
    """Changes entries of `rope_parameters`; None removes one."""

    def edit(config: Config) -> None:
        parameters = config["rope_parameters"] | entries
        config["rope_parameters"] = {name: value for name, value in parameters.items() if value is not None}

    return edit


def both(*edits: Edit) -> Edit:
    """Several edits, one after the other."""

    def edit(config: Config) -> None:
        for each in edits:
            each(config)

    return edit


ORIGINAL = "original_max_position_embeddings"
TOP = setting(**{ORIGINAL: 64})
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ALL_FULL = ["full_attention", "full_attention"]

SAME: dict[str, tuple[str, Edit]] = {
    "smollm3, no rotation": ("smollm3", rotary_of_old()),
    "smollm3, no base": ("smollm3", rotary_of_old(type="linear", factor=2.0)),
    "llama, no rotation": ("llama", rotary_of_old()),
    "linear by its old name": ("llama", rotary_of_old(500.0, type="linear", factor=4.0)),
    "two bases": ("llama", both(setting(rope_theta=777.0), rotary(rope_theta=10000.0))),
    "rotation told twice": ("llama", setting(rope_scaling={"type": "linear", "factor": 4.0})),
    "dynamic": ("llama-dynamic", rotary(factor=4.0)),
    "yarn": ("qwen2", rotary_of_old(1e4, type="yarn", factor=4.0)),
    "yarn, original in it": ("qwen2", rotary_of_old(1e4, type="yarn", factor=4.0, **{ORIGINAL: 64})),
    "yarn, original beside it": ("qwen2", both(rotary_of_old(1e4, type="yarn", factor=4.0), TOP)),
    "yarn, original in both": ("qwen2-yarn", TOP),
    "yarn, factor null": ("qwen2", rotary_of_old(1e4, type="yarn", factor=None, **{ORIGINAL: 64})),
    "yarn, other turns": ("qwen2-yarn", rotary(beta_fast=8.0, beta_slow=2.0, **{ORIGINAL: 64})),
    "yarn, attention factor": ("qwen2-yarn", rotary(attention_factor=0.5)),
    "yarn, one mscale": ("qwen2-yarn", rotary(mscale_all_dim=1.0)),
    "llama3, original beside it": ("llama", both(rotary(**LLAMA3), TOP)),
    "llama3, original in both": ("llama3-scaling", TOP),
    "llama3, no original": ("llama3-scaling", rotary(**{ORIGINAL: None})),
    "longrope, original beside it": ("phi3-longrope", rotary(**{ORIGINAL: None})),
    "longrope, none beside it": ("phi3-longrope", lambda config: config.pop(ORIGINAL)),
    "longrope, two originals": ("phi3-longrope", setting(**{ORIGINAL: 200})),
    "longrope, attention factor": ("phi3-longrope", rotary(attention_factor=1.5)),
    "longrope called su": ("phi3-longrope", rotary(rope_type="su")),
    "longrope called yarn": ("phi3-longrope", rotary(rope_type="yarn")),
    "phi3, part of a head": ("phi3-wide", setting(partial_rotary_factor=0.5)),
    "phi3, another part of a head": ("phi3-wide", rotary(partial_rotary_factor=0.5)),
    "phi3, kinds that count for nothing": ("phi3", setting(layer_types=ALL_FULL)),
    "llama, a window that counts for nothing": ("llama", setting(sliding_window=16)),
    "mistral, usual window": ("mistral", lambda config: config.pop("sliding_window")),
    "mistral, kinds": ("mistral-window", setting(layer_types=ALL_FULL)),
    "mistral, kinds null": ("mistral-window", setting(layer_types=None)),
    "mistral, both kinds": ("mistral-window", setting(layer_types=["full_attention", "sliding_attention"])),
    "qwen2, windows off": ("qwen2-window", both(setting(use_sliding_window=False, layer_types=None))),
    "qwen2, windows from a layer on": ("qwen2-window", setting(max_window_layers=2, layer_types=None)),
    "qwen3, a bias that counts for nothing": ("qwen3", setting(mlp_bias=True)),
    "silu by its other name": ("llama", setting(hidden_act="swish")),
}


@pytest.mark.parametrize("case", SAME)
def test_same(case: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """A configuration that states something in another way, or twice, is read as transformers reads it."""
    family, edit = SAME[case]
    check(edited(made(family), tmp_path / "source", edit))


REFUSED: dict[str, tuple[str, Edit, str]] = {
    "part of a head": ("llama", setting(partial_rotary_factor=0.5), "not supported in llama, only in phi3"),
    "rotation of each kind": (
        "ministral",
        setting(rope_parameters={"full_attention": {"rope_type": "linear", "factor": 4.0, "rope_theta": 5e5}}),
        "layers of the type 'full_attention' is not",
    ),
    "linear phi3": (
        "phi3",
        rotary_of_old(type="linear", factor=2.0),
        "rope_type is 'linear', supported in phi3 are default, ",
    ),
    "su of others": (
        "llama",
        rotary_of_old(type="su", factor=2.0),
        "rope_type is 'su', supported in llama are default, ",
    ),
    "proportional": ("llama", rotary(rope_type="proportional"), "rope_type is 'proportional', supported in llama are"),
    "windows off, kinds on": (
        "qwen2-window",
        setting(use_sliding_window=False),
        "layer_types have windows, but no sliding_window is in use",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, made: Callable[[str], Path], tmp_path: Path) -> None:
    """A configuration that transformers refuses or computes differently is refused, with the cause."""
    family, edit, message = REFUSED[case]
    with pytest.raises(ExportError, match=message):
        read_source(edited(made(family), tmp_path / "source", edit))


@pytest.mark.parametrize("scale", [1, 2])
def test_heads_stored_apart(scale: int, made: Callable[[str], Path], tmp_path: Path) -> None:
    """A head that config.json ties to the embedding is tied only if the stored head equals the embedding."""
    source = edited(made("smollm2"), tmp_path / "source", lambda config: None)
    tensors = load_file(source / "model.safetensors")
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding[::-1].copy() * scale if scale > 1 else embedding.copy()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    check(source)

"""GGUF files of Gemma 3, whose layers differ: windows with rotations of their own, and norms after each part."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from model_export.errors import ExportError
from model_export.opening import read_source
from model_export.sources.gguf.read import open_gguf, read_gguf
from tests.model_export import tiny
from tests.model_export.session import Session
from tests.model_export.test_export import expected, run, text

WINDOW = 24
LAYERS = 12


def written(folder: Path, kind: str = "F32", **entries: float | str | bool) -> Path:
    """A tiny file with two layers that have no window."""
    keys = {"attention.sliding_window": WINDOW, **entries}
    path = folder / f"Tiny.{kind}.gguf"
    return tiny.gguf(path, GGMLQuantizationType[kind], family="gemma3", layers=LAYERS, entries=keys)


@pytest.mark.parametrize("form", ["float32", "int8"])
def test_the_graph_is_the_source(form: str, tmp_path: Path) -> None:
    """It computes what the source's weights do, beyond the window too."""
    source, tokens = written(tmp_path), text(100)
    directory = run(source, tmp_path / "model", max_kl=0.5, quantization=form)
    wanted = expected(source, tokens)
    actual = Session(directory).forward([tokens], past=[0])
    if form == "float32":
        np.testing.assert_allclose(actual, wanted, atol=2e-3)
    assert np.abs(actual - wanted).mean() < 0.15 * wanted.std()


def test_layers_differ(tmp_path: Path) -> None:
    """Every sixth layer sees everything and rotates by the file's base and scaling, the others by a base of 10,000."""
    entries = {"rope.freq_base": 50000.0, "rope.scaling.type": "linear", "rope.scaling.factor": 4.0}
    architecture = read_gguf(open_gguf(written(tmp_path, **entries))).architecture
    full = [attention.window is None for attention in architecture.attention]
    assert full == ([False] * 5 + [True]) * 2
    assert [attention.local for attention in architecture.attention] == [not each for each in full]
    pairs = np.arange(0, tiny.HEAD_DIM, 2) / tiny.HEAD_DIM
    for attention, base, factor in zip(architecture.attention[4:6], (10000.0, 50000.0), (1, 4), strict=True):
        np.testing.assert_allclose(architecture.rotation(attention).frequencies, base**-pairs / factor)


def test_a_window_as_long_as_the_context(tmp_path: Path) -> None:
    """It is none, but the layer keeps its rotation."""
    path = written(tmp_path, **{"attention.sliding_window": tiny.CONTEXT})
    layers = read_gguf(open_gguf(path)).architecture.attention
    assert {layer.window for layer in layers} == {None}
    assert [layer.local for layer in layers[4:6]] == [True, False]


def test_scores_of_the_largest_model(tmp_path: Path) -> None:
    """Only with 62 layers scores are scaled by the hidden size per head."""
    path = tmp_path / "Tiny.gguf"
    tiny.gguf(path, GGMLQuantizationType.F32, family="gemma3", layers=62)
    assert read_gguf(open_gguf(path)).architecture.score_divisor == tiny.HIDDEN // tiny.HEADS
    assert read_gguf(open_gguf(written(tmp_path))).architecture.score_divisor == tiny.HEAD_DIM


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("attention.sliding_window_pattern", 5),
        ("rope.freq_base_swa", 500.0),
        ("rope.scaling.type", "yarn"),
        ("rope.dimension_count", 16),
        ("final_logit_softcapping", 30.0),
        ("attention.causal", False),
    ],
)
def test_other_variants_are_refused(key: str, value: float | str | bool, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"Tiny.F32.gguf: gemma3.{key} .*supported"):
        read_source(written(tmp_path, **{key: value}))


def test_keys_that_say_what_all_models_have(tmp_path: Path) -> None:
    usual = {"attention.sliding_window_pattern": 6, "rope.freq_base_swa": 10000.0, "rope.scaling.type": "none"}
    assert read_source(written(tmp_path, **usual)).dimensions.layers == LAYERS

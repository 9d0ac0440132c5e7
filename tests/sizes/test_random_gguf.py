"""The files of random weights have the sizes that they claim, and can be exported and run."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest

from model_export.export import Options, export
from model_export.opening import read_source
from service import manifest
from service.engine.ort.model import Model
from tests.sizes import random_gguf
from tests.sizes.random_gguf import FORMS, LLAMA, QWEN, SHAPES, Family, Shape

PARAMETERS = {"qwen2.5-0.5b": 494_032_768, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248}

# The least standard deviation of the logits after a token: those of a broken graph would be equal.
DISTINCT = 0.05


def tiny(family: Family, *, tied: bool) -> Shape:
    """A shape whose file is made and exported in a second."""
    return Shape(
        family,
        layers=2,
        hidden=64,
        feed_forward=96,
        heads=4,
        kv_heads=2,
        vocabulary=2048,
        context=160,
        rope_base=1e4,
        tied=tied,
    )


@pytest.mark.parametrize("name", SHAPES)
def test_shapes_have_the_published_numbers_of_parameters(name: str) -> None:
    assert sum(math.prod(sides) for _, sides in SHAPES[name].tensors()) == PARAMETERS[name]


@pytest.mark.parametrize("size", sorted({shape.vocabulary for shape in SHAPES.values()}))
def test_vocabularies_hold_each_token_once(size: int) -> None:
    tokens, merges = random_gguf.vocabulary(size)
    assert len(set(tokens)) == len(tokens) == size
    assert [first + second for first, second in merges] == tokens[256:]
    assert {part for merge in merges for part in merge} <= set(tokens)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("family", "tied"), [(QWEN, True), (LLAMA, True), (LLAMA, False)])
def test_files_are_exported_and_run(family: Family, tied: bool, form: str, tmp_path: Path) -> None:
    """The export has the sizes of the shape, and the service loads it and computes finite logits that differ."""
    shape, path = tiny(family, tied=tied), tmp_path / f"tiny-{form}.gguf"
    random_gguf.write(shape, form, path)
    export(path, tmp_path / "model", Options(), lambda label, total: lambda: None)
    described = manifest.load(tmp_path / "model")
    assert described.architecture == family.architecture
    assert described.quantization.source == form
    assert (described.vocab_size, described.context_length) == (shape.vocabulary, shape.context)
    assert (described.kv.layers, described.kv.kv_heads, described.kv.head_dim) == (2, 2, 16)
    model = Model(tmp_path / "model", described, slots=1, context_length=64, threads=1, batch_invariant=True)
    prompt = model.forward(0, [list(range(20))], [0], [(0, 0), (0, 19)]).copy()
    for logits in (*prompt, *model.forward(0, [[20]], [20], [(0, 0)])):
        assert logits.shape == (shape.vocabulary,)
        assert np.isfinite(logits).all()
        assert logits.std() > DISTINCT


@pytest.mark.parametrize("form", FORMS)
def test_weights_have_the_deviation_of_trained_ones(form: str, tmp_path: Path) -> None:
    random_gguf.write(tiny(LLAMA, tied=True), form, tmp_path / "tiny.gguf")
    weights = read_source(tmp_path / "tiny.gguf").checkpoint.floats("token_embd.weight")
    assert weights.std() == pytest.approx(random_gguf.DEVIATION, rel=0.1)
    assert abs(weights.mean()) < random_gguf.DEVIATION / 50


def test_text_survives_the_tokenizer(tmp_path: Path) -> None:
    """English becomes fewer tokens than characters, and any text comes back as it was."""
    random_gguf.write(tiny(LLAMA, tied=True), "Q4_0", tmp_path / "tiny.gguf")
    vocabulary = read_source(tmp_path / "tiny.gguf").origin.vocabulary
    text = "The weather in the north was worse than in the south. Ünïcödé, 12345!\n"
    ids = vocabulary.tokenizer.encode(text).ids
    assert vocabulary.tokenizer.decode(ids) == text
    assert len(ids) < 0.8 * len(text)


def test_the_same_shape_gives_the_same_file(tmp_path: Path) -> None:
    for name in ("one.gguf", "other.gguf"):
        random_gguf.write(tiny(QWEN, tied=True), "Q8_0", tmp_path / name)
    assert (tmp_path / "one.gguf").read_bytes() == (tmp_path / "other.gguf").read_bytes()

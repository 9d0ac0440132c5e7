"""The KV cache in tiles: copies, moves and what is given back, over our own operators in numpy."""

from __future__ import annotations

import math
import mmap

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType

from model_export.graph.initializers import Initializers
from model_export.opening import read_source
from service import manifest
from service.engine.cache import Copy
from service.engine.ort.device import granule, row_bytes
from service.engine.ort.model import Model
from service.errors import ModelDirectoryError
from tests.model_export import tiny
from tests.support.fakes import manifest as described_model
from tests.support.reference_kernels import ReferenceCpu

SLOTS, CONTEXT = 6, 150
# Sums in another order, which may round a key to the next float16.
CLOSE = {"rtol": 0, "atol": 0.002}
LENGTHS = [1, 15, 16, 17, 31, 32, 33, 100]


def layout(dtype="float16", tile=16):
    sizes = {"layers": tiny.LAYERS, "kv_heads": tiny.KV_HEADS, "head_dim": tiny.HEAD_DIM}
    return manifest.KVLayout(**sizes, dtype=dtype, tile=tile)


def described(dtype="float16", **changes):
    vocabulary = tiny.VOCAB - tiny.VOCAB % 32 + 32
    values = {"kernels": "own", "kv": layout(dtype), "vocab_size": vocabulary, "context_length": tiny.CONTEXT}
    return described_model(**{**values, **changes})


@pytest.fixture(scope="module", params=["float16", "float32"])
def model(request, tmp_path_factory):
    """A tiny model whose operators are computed by numpy."""
    folder = tmp_path_factory.mktemp("tiled")
    path = tiny.gguf(folder / "Tiny.gguf", GGMLQuantizationType.Q4_1, unused_tokens=-tiny.VOCAB % 32)
    with (folder / manifest.WEIGHTS_FILE).open("wb") as file:
        graph = read_source(path).build_over_kernels(request.param, Initializers(file), lambda: None)
        ir.save(graph, folder / manifest.MODEL_FILE)
    shape = {"slots": SLOTS, "context_length": CONTEXT, "threads": 1, "batch_invariant": True}
    return Model(folder, described(request.param), **shape, device=ReferenceCpu())


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(3).integers(0, tiny.VOCAB, CONTEXT).tolist()


def filled(model, slot, tokens):
    """The logits after the last of `tokens`, which `slot` then holds."""
    return model.forward(slot, [tokens], [0], [(0, len(tokens) - 1)])[0].copy()


def continued(model, slot, tokens, length):
    """The logits after `tokens`, of which the slot holds the first `length`."""
    return model.forward(slot, [tokens[length:]], [length], [(0, len(tokens) - length - 1)])[0].copy()


@pytest.mark.parametrize("length", LENGTHS)
def test_a_copied_prefix_continues(model, tokens, length):
    """A copy of any length holds its positions: the rest computed after it gives the logits of the whole."""
    whole = filled(model, 0, tokens[:120])
    filled(model, 3, tokens[::-1][:140])
    model.copy([Copy(0, 3, length)])
    np.testing.assert_allclose(continued(model, 3, tokens[:120], length), whole, **CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
def test_forks_do_not_see_one_another(model, tokens, length):
    """What source and copy write behind a common prefix stays their own, within a tile too."""
    other = tokens[::-1]
    expected = [filled(model, 0, tokens[:length] + rest) for rest in (tokens[length:120], other[:20])]
    filled(model, 0, tokens[:length])
    model.copy([Copy(0, 1, length)])
    np.testing.assert_allclose(continued(model, 0, tokens[:120], length), expected[0], **CLOSE)
    np.testing.assert_allclose(continued(model, 1, tokens[:length] + other[:20], length), expected[1], **CLOSE)
    again = model.forward(0, [tokens[119:120]], [119], [(0, 0)])[0]
    np.testing.assert_allclose(again, expected[0], **CLOSE)


@pytest.mark.parametrize("length", LENGTHS)
def test_what_is_kept_stays(model, tokens, length):
    """A slot that gives back all but a prefix still holds that, and so does the slot that a prefix moves to."""
    whole = filled(model, 2, tokens[:120])
    model.copy([Copy(2, 2, length)])
    np.testing.assert_allclose(continued(model, 2, tokens[:120], length), whole, **CLOSE)
    model.copy([Copy(2, 4, length, moves=True)])
    np.testing.assert_allclose(continued(model, 4, tokens[:120], length), whole, **CLOSE)


def test_what_is_given_up_takes_no_memory(model, tokens):
    """Behind the kept pages a slot is zeros again, as memory that was never written."""
    filled(model, 5, tokens[:140])
    model.copy([Copy(5, 5, 17)])
    block, size = model._kv["key.0"].host, model._slot_bytes
    slot = block[5 * size : 6 * size]
    kept = math.ceil(17 / model._granule) * model._granule * model._position_bytes
    assert slot[:kept].any()
    assert not slot[kept:].any()
    model.copy([Copy(5, 4, 0, moves=True)])
    assert not slot.any()


def test_other_slots_stay_as_they_are(model, tokens):
    """Copies, moves and calls touch no slot but their own."""
    before = filled(model, 1, tokens[:140])
    filled(model, 0, tokens[50:140])
    filled(model, 2, tokens[20:130])
    model.copy([Copy(0, 2, 31), Copy(2, 3, 18), Copy(0, 0, 3), Copy(3, 0, 17, moves=True)])
    model.forward(2, [tokens[:3]], [31], [])
    np.testing.assert_allclose(model.forward(1, [tokens[139:140]], [139], [(0, 0)])[0], before, **CLOSE)


@pytest.mark.parametrize(
    ("heads", "size", "dtype", "positions"),
    [
        (3, 64, "float16", 32),
        (8, 128, "float16", 16),
        (2, 32, "float16", 32),
        (1, 16, "float32", 64),
        (5, 80, "float16", 128),
    ],
)
def test_positions_that_fill_pages(heads, size, dtype, positions):
    """The least number of whole tiles of all heads that fill whole pages."""
    kv = manifest.KVLayout(layers=1, kv_heads=heads, head_dim=size, dtype=dtype, tile=16)
    assert granule(kv) == positions
    assert granule(kv) * row_bytes(kv) % mmap.PAGESIZE == 0


def test_memory_is_planned_in_two_bytes():
    """A position of a float16 KV cache takes half of one in float32."""
    half, whole = described("float16").kv, described("float32").kv
    assert whole.bytes_per_token == 2 * half.bytes_per_token == 2 * 2 * tiny.LAYERS * tiny.KV_HEADS * tiny.HEAD_DIM * 2


@pytest.mark.parametrize(
    "changes",
    [{"kernels": "stock"}, {"kv": layout(tile=1)}, {"devices": ("cpu", "cuda")}],
)
def test_manifests_that_contradict_themselves(changes):
    """Own kernels have a KV cache in tiles and run on the CPU; onnxruntime's have none."""
    with pytest.raises(ValueError, match=r"do not go with kv\.tile"):
        described(**changes)


def test_a_graph_of_another_kv_cache(model, tmp_path):
    """A graph and a manifest that differ in the type of the KV cache are refused."""
    other = "float32" if model._kv_layout.dtype == "float16" else "float16"
    folder = tmp_path / "model"
    folder.mkdir()
    path = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.Q4_1, unused_tokens=-tiny.VOCAB % 32)
    with (folder / manifest.WEIGHTS_FILE).open("wb") as file:
        graph = read_source(path).build_over_kernels(other, Initializers(file), lambda: None)
        ir.save(graph, folder / manifest.MODEL_FILE)
    with pytest.raises(ModelDirectoryError, match=r"past_key\.0 is tensor"):
        Model(
            folder,
            described(model._kv_layout.dtype),
            slots=1,
            context_length=32,
            threads=1,
            batch_invariant=True,
            device=ReferenceCpu(),
        )

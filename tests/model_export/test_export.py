"""Exporting tiny random models of each family, in each form."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from gguf import GGMLQuantizationType

from model_export.__main__ import main
from model_export.errors import ExportError, TooFarError
from model_export.export import Options, export
from model_export.native.source import DecoderSource
from model_export.opening import read_source
from model_export.verify.runner import Runner
from service import manifest
from tests.model_export import tiny
from tests.model_export.session import Session


def quiet(label: str, total: int) -> Callable[[], object]:
    """No progress bar."""
    return lambda: None


def run(source: Path, directory: Path, **options: object) -> Path:
    """Exports without a progress bar, and with a high `max_kl`: random models are sharper than real ones."""
    export(source, directory, Options(**{"max_kl": 0.05} | options), quiet)
    return directory


def text(length: int, seed: int = 0) -> np.ndarray:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, length)


def expected(source: Path, tokens: np.ndarray) -> np.ndarray:
    """The logits of the source weights."""
    return read_source(source).logits(tokens, lambda: None)


VARIANTS = {family: {} for family in tiny.FAMILIES} | {
    "mistral": {"tie_word_embeddings": False},
    "qwen3": {"tie_word_embeddings": False},
    "linear": {"family": "llama", "rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama3": {
        "family": "llama",
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
    },
    "window": {"family": "mistral", "sliding_window": 24},
    "window by layer": {"family": "qwen2", "use_sliding_window": True, "sliding_window": 24, "max_window_layers": 1},
    "smollm3": {"no_rope_layers": [1, 0]},
    "phi3": {"sliding_window": 40, "partial_rotary_factor": 0.5},
    "seed_oss": {"tie_word_embeddings": False},
    "yarn": {
        "family": "qwen2",
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48},
    },
    "longrope": {
        "family": "phi3",
        "original_max_position_embeddings": 128,
        "rope_scaling": {
            "type": "su",
            "short_factor": [1.0 + pair / 8 for pair in range(16)],
            "long_factor": [9.0] * 16,
        },
    },
}


@pytest.fixture(params=VARIANTS)
def source(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A tiny source of each variant."""
    return tiny.hugging_face(tmp_path / "Tiny", **{"family": request.param} | VARIANTS[request.param])


def test_float32_is_the_source(source: Path, tmp_path: Path) -> None:
    """In float32 the exported graph computes the same as the source weights, up to rounding."""
    session = Session(run(source, tmp_path / "model", quantization="float32"))
    tokens = text(100)
    actual = session.forward([tokens], past=[0])
    np.testing.assert_allclose(actual, expected(source, tokens), atol=2e-4)


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_int8_is_close_to_the_source(family: str, tmp_path: Path) -> None:
    """In int8 a random model's logits are off by a fraction of their spread."""
    source = tiny.hugging_face(tmp_path / "Tiny", family)
    tokens = text(100)
    wanted = expected(source, tokens)
    actual = Session(run(source, tmp_path / "model", quantization="int8")).forward([tokens], past=[0])
    assert np.abs(actual - wanted).mean() < 0.15 * wanted.std()


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_gguf_of_each_type(kind: str, tmp_path: Path) -> None:
    """A GGUF file of each type exports in its own form and stays close to its dequantized weights."""
    source = tiny.gguf(tmp_path / f"Tiny.{kind}.gguf", GGMLQuantizationType[kind])
    directory = run(source, tmp_path / "model")
    description = manifest.load(directory)
    assert description.id == "Tiny"
    assert description.quantization.weights == "int8"
    tokens = text(64)
    wanted = expected(source, tokens)
    actual = Session(directory).forward([tokens], past=[0])
    assert np.abs(actual - wanted).mean() < 0.15 * wanted.std()


def test_gguf_and_hugging_face_agree(tmp_path: Path) -> None:
    """The same weights give the same logits from either source, although GGUF interleaves rotary pairs."""
    directory = tiny.hugging_face(tmp_path / "Tiny")
    file = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.F32)
    np.testing.assert_array_equal(expected(directory, text(50)), expected(file, text(50)))


@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
def test_chunks_and_ragged_batches(form: str, tmp_path: Path) -> None:
    """A text's logits are bit-equal for any prompt chunks of at least two tokens and any lengths of other rows."""
    source = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.Q4_0)
    session = Session(run(source, tmp_path / "model", quantization=form))
    tokens, other = text(60), text(33, seed=1)
    whole = session.forward([tokens], past=[0])
    chunks = [session.forward([tokens[start : start + 20]], past=[start]) for start in range(0, 60, 20)]
    np.testing.assert_array_equal(np.concatenate(chunks), whole)
    np.testing.assert_array_equal(session.forward([tokens, other], past=[0, 0])[:60], whole)


@pytest.mark.parametrize("form", ["float32", "int8", "int4"])
def test_decoding_does_not_depend_on_the_batch(form: str, tmp_path: Path) -> None:
    """With a lone row padded as the manifest says, a row's decode step has the same bits in any company."""
    source = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.Q4_0)
    directory = run(source, tmp_path / "model", quantization=form)
    session, tokens = Session(directory), text(40)
    session.forward([tokens] * 5, past=[0] * 5)
    new = text(5, seed=2)[:, None]
    rows = 2 if manifest.load(directory).quantization.pads_lone_row else 1
    alone = session.forward([new[0]] + [new[0][:0]] * (rows - 1), past=[40] * rows)
    together = session.forward(list(new), past=[40, 7, 12, 3, 39])
    np.testing.assert_array_equal(together[0], alone[0])


def test_idle_row_keeps_its_cache(tmp_path: Path) -> None:
    """A row without valid tokens leaves its KV cache unchanged."""
    source = tiny.hugging_face(tmp_path / "Tiny")
    session = Session(run(source, tmp_path / "model", quantization="float32"))
    session.forward([text(10), text(10)], past=[0, 0])
    before = session.caches["past_key.0"][1].copy()
    session.forward([text(1), text(0)], past=[10, 10])
    np.testing.assert_array_equal(session.caches["past_key.0"][1], before)


def test_only_wanted_positions_get_logits(tmp_path: Path) -> None:
    """`logits_idx` picks positions of the flattened batch, or none."""
    session = Session(run(tiny.hugging_face(tmp_path / "Tiny"), tmp_path / "model", quantization="float32"))
    every = session.forward([text(6), text(6, seed=1)], past=[0, 0])
    some = session.forward([text(6), text(6, seed=1)], past=[0, 0], wanted=[2, 11])
    np.testing.assert_allclose(some, every[[2, 11]], atol=1e-5)
    assert session.forward([text(6)], past=[0], wanted=[]).shape == (0, tiny.VOCAB)


@pytest.mark.parametrize("form", ["float32", "int8"])
@pytest.mark.parametrize("variant", ["llama", "mistral", "qwen2", "qwen3", "window", "smollm3", "phi3"])
def test_any_chunks_give_the_same_bits(variant: str, form: str, tmp_path: Path) -> None:
    """The graph is close to the source; any chunks and wanted positions give bit-equal results and KV caches."""
    source = tiny.hugging_face(tmp_path / "Tiny", **{"family": variant} | VARIANTS[variant])
    session = Session(run(source, tmp_path / "model", quantization=form))
    tokens = text(100)
    wanted = expected(source, tokens)
    whole = session.forward([tokens], past=[0])
    assert np.abs(whole - wanted).mean() < 0.15 * wanted.std()
    caches = {name: cache.copy() for name, cache in session.caches.items()}
    assert session.forward([tokens[:60]], past=[0], wanted=[]).shape == (0, tiny.VOCAB)
    last = session.forward([tokens[60:]], past=[60], wanted=[39])
    np.testing.assert_array_equal(last, whole[99:])
    for name, cache in session.caches.items():
        np.testing.assert_array_equal(cache[0, :, :100], caches[name][0, :, :100])


def test_manifest_describes_the_model(tmp_path: Path) -> None:
    """The manifest has the properties of the source and the options, and its hashes match the files."""
    source = tiny.hugging_face(tmp_path / "Tiny-1M", dtype="bfloat16")
    described = manifest.load(run(source, tmp_path / "model", aliases=("tiny",), owned_by="us"))
    assert (described.id, described.aliases, described.owned_by) == ("Tiny-1M", ("tiny",), "us")
    assert described.context_length == tiny.CONTEXT
    assert described.special_tokens.end == (0,)
    assert described.special_tokens.default_prompt == 0
    assert not described.special_tokens.add_bos
    assert (described.kv.layers, described.kv.kv_heads, described.kv.head_dim) == (2, 2, 32)
    assert described.quantization.source == "bfloat16"
    assert set(described.files) == {"model.onnx", "model.onnx.data", "self_test.onnx", "tokenizer.json"}


def broken_gguf(path: Path) -> Path:
    """A GGUF file cut off in its last tensor."""
    whole = tiny.gguf(path, GGMLQuantizationType.Q4_1).read_bytes()
    path.write_bytes(whole[:-500])
    return path


def broken_config(path: Path, **changes: object) -> Path:
    """A Hugging Face directory with other entries in its configuration."""
    return tiny.hugging_face(path, **changes)


BAD_SOURCES: dict[str, tuple[Callable[[Path], Path], str]] = {
    "nothing": (lambda path: path, "does not exist"),
    "empty directory": (lambda path: path.mkdir() or path, "config.json does not exist"),
    "truncated": (broken_gguf, "not a complete GGUF file"),
    "not a model": (lambda path: path.write_bytes(b"hello world" * 100) and path, "not a complete GGUF file"),
    "empty file": (lambda path: path.touch() or path, "not a complete GGUF file"),
    "no tensor": (
        lambda path: tiny.gguf(path, GGMLQuantizationType.F32, leave_out="model.norm.weight"),
        "has no tensor output_norm.weight",
    ),
    "other architecture": (lambda path: tiny.hugging_face(path, "llama", model_type="bitnet"), "'bitnet' is not"),
    "other shape": (
        lambda path: tiny.hugging_face(path, intermediate_size=128),
        "has shape [96, 64], expected [128, 64]",
    ),
    "unknown tensor": (
        lambda path: tiny.hugging_face(path, "qwen2", model_type="llama"),
        "has a tensor model.layers.0.self_attn.k_proj.bias",
    ),
    "unknown scaling": (
        lambda path: tiny.hugging_face(path, rope_scaling={"rope_type": "spiral"}),
        "rope_type is 'spiral'",
    ),
    "unknown pre-tokenizer": (
        lambda path: tiny.gguf(path, GGMLQuantizationType.F32, pre="foo"),
        "tokenizer.ggml.pre is 'foo'",
    ),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_source_is_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A source that cannot be exported ends with one sentence and exit code 2, and leaves nothing behind."""
    make, message = BAD_SOURCES[case]
    source, target = make(tmp_path / "source"), tmp_path / "out"
    target.mkdir()
    assert main([str(source), str(target / "model")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(target.iterdir()) == []


def test_gate_keeps_what_it_refuses(tmp_path: Path) -> None:
    """An export beyond the allowed divergence fails, and keeps a complete model beside its target."""
    source, out = tiny.hugging_face(tmp_path / "Tiny"), tmp_path / "out"
    kept = out / "model.refused"
    for _ in range(2):  # the second one replaces the first
        with pytest.raises(TooFarError, match="too far from its source") as refusal:
            run(source, out / "model", quantization="int8", max_kl=1e-12)
        assert list(out.iterdir()) == [kept]
    assert f"it is kept in {kept}: move it to {out / 'model'} to take it without another export" in str(refusal.value)
    kept.rename(out / "model")
    described = manifest.load(out / "model")
    assert described.quality.kl > 1e-12


def test_what_is_in_the_way_of_a_refused_model_stays(tmp_path: Path) -> None:
    """A refused model replaces nothing but a model."""
    (tmp_path / "model.refused").mkdir()
    (tmp_path / "model.refused" / "mine").touch()
    with pytest.raises(TooFarError):
        run(tiny.hugging_face(tmp_path / "Tiny"), tmp_path / "model", quantization="int8", max_kl=1e-12)
    assert (tmp_path / "model.refused" / "mine").exists()
    (kept,) = tmp_path.glob("model.refused.*")
    assert (kept / "manifest.json").is_file()


def test_interrupt_leaves_nothing(tmp_path: Path) -> None:
    """Ctrl-C during an export leaves nothing behind."""

    def interrupt(label: str, total: int) -> Callable[[], object]:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        export(tiny.hugging_face(tmp_path / "Tiny"), tmp_path / "out" / "model", Options(), interrupt)
    assert not (tmp_path / "out").exists()


def test_existing_directory_is_kept(tmp_path: Path) -> None:
    """A destination that exists is replaced only on request, and only if it is a model directory."""
    source, target = tiny.hugging_face(tmp_path / "Tiny"), tmp_path / "model"
    target.mkdir()
    with pytest.raises(ExportError, match="give --overwrite"):
        run(source, target)
    with pytest.raises(ExportError, match="not a model directory"):
        run(source, target, overwrite=True)
    target.rmdir()
    run(source, target, quantization="float32")
    run(source, target, quantization="float32", id="other", overwrite=True)
    assert json.loads((target / "manifest.json").read_text())["id"] == "other"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Tiny", "model"]


def test_nothing_rounded_offers_no_bound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a float32 export is far from its source, the graph is wrong, and the message offers no larger bound."""
    right = DecoderSource.logits_at
    monkeypatch.setattr(DecoderSource, "logits_at", lambda *arguments: 2 * right(*arguments))
    with pytest.raises(TooFarError, match="nothing was rounded, so the graph does not compute") as refusal:
        run(tiny.hugging_face(tmp_path / "Tiny"), tmp_path / "model", quantization="float32")
    assert "--max-kl" not in str(refusal.value)
    assert [path.name for path in tmp_path.iterdir()] == ["Tiny"]


def test_graph_that_cannot_run(tmp_path: Path) -> None:
    """A graph that onnxruntime cannot load ends in one sentence."""
    (tmp_path / "model.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match="onnxruntime cannot run the exported graph: ") as refusal:
        Runner(tmp_path / "model.onnx", 8)
    assert "\n" not in str(refusal.value)


def test_other_forms_beside_the_weights_do_not_count(tmp_path: Path) -> None:
    """The size of the source is that of the weights that were read."""
    source = tiny.hugging_face(tmp_path / "Tiny")
    size = sum(path.stat().st_size for path in source.glob("*.safetensors"))
    shutil.copy(source / "model-0.safetensors", source / "consolidated.safetensors")
    exported = run(source, tmp_path / "model", quantization="float32")
    measured = manifest.load(exported).quality.source
    assert measured is not None
    assert measured.bytes == size

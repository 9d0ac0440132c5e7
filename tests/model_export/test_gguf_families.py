"""GGUF files of each family hold what Hugging Face directories hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize

from model_export.errors import ExportError
from model_export.export import Options, export
from model_export.opening import read_source
from service import manifest
from tests.model_export import tiny
from tests.model_export.session import Session

SHORT = 1 + np.arange(16, dtype=np.float32) / 8

# The same settings as keys of a GGUF file and as entries of config.json.
SAME: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    family: ({}, {}) for family, shape in tiny.FAMILIES.items() if shape.gguf
} | {
    "llama linear": (
        {"entries": {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "llama window": ({"entries": {"attention.sliding_window": 24}}, {"family": "mistral", "sliding_window": 24}),
    "qwen2 yarn": (
        {
            "entries": {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 48,
            }
        },
        {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}},
    ),
    "qwen2 yarn by other turns": (
        {
            "entries": {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 4.0,
                "rope.scaling.original_context_length": 48,
                "rope.scaling.yarn_beta_fast": 4.0,
                "rope.scaling.yarn_beta_slow": 2.0,
            }
        },
        {
            "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 48}
            | {"beta_fast": 4.0, "beta_slow": 2.0}
        },
    ),
    "llama linear by its factor alone": (
        {"entries": {"rope.scaling.factor": 4.0}},
        {"rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "smollm3": ({"layers": 4}, {"num_hidden_layers": 4}),
    "seed_oss": ({"pre": "seed-coder"}, {}),
    "phi3": ({"entries": {"attention.sliding_window": 24}}, {"sliding_window": 24}),
    "phi3 partial": ({"entries": {"rope.dimension_count": 16}}, {"partial_rotary_factor": 0.5}),
    "phi3 longrope": (
        {"short_factors": SHORT, "entries": {"rope.scaling.original_context_length": 64}},
        {
            "original_max_position_embeddings": 64,
            "rope_scaling": {"type": "longrope", "short_factor": SHORT.tolist(), "long_factor": [9.0] * 16},
        },
    ),
}


@pytest.mark.parametrize("case", SAME)
def test_gguf_and_hugging_face_agree(case: str, tmp_path: Path) -> None:
    """The same weights and settings give the same logits and context from either source."""
    metadata, changes = SAME[case]
    family = case.split(maxsplit=1)[0]
    file = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.F32, family=family, **metadata)
    directory = tiny.hugging_face(tmp_path / "Tiny", **{"family": family} | changes)
    one, other = read_source(file), read_source(directory)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 60)
    np.testing.assert_allclose(one.logits(tokens, int), other.logits(tokens, int), atol=1e-5)
    assert one.dimensions.context_length == other.dimensions.context_length


@pytest.mark.parametrize("family", ["smollm3", "phi3"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0"])
def test_quantized_matrices_are_kept(family: str, kind: str, tmp_path: Path) -> None:
    """Matrices in blocks stay blocks when they are cut out of larger ones and when their rows are reordered."""
    source = tiny.gguf(tmp_path / f"Tiny.{kind}.gguf", GGMLQuantizationType[kind], family=family)
    export(source, tmp_path / "model", Options(max_kl=0.05), lambda label, total: int)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 60)
    wanted = read_source(source).logits(tokens, int)
    actual = Session(tmp_path / "model").forward([tokens], past=[0])
    assert np.abs(actual - wanted).mean() < 0.15 * wanted.std()


# Keys that describe a computation that the builder does not have.
OTHERWISE: dict[str, int | float | bool | str] = {
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "expert_count": 8,
    "leading_dense_block_count": 1,
    "pooling_type": 3,
    "use_parallel_residual": True,
    "embedding_scale": 3.0,
    "residual_scale": 3.0,
    "logit_scale": 3.0,
    "attention.causal": False,
    "attention.scale": 0.5,
    "attention.clamp_kqv": 1.0,
    "attention.max_alibi_bias": 8.0,
    "attention.temperature_scale": 0.1,
    "attention.sliding_window_pattern": 2,
    "rope.scale_linear": 4.0,
    "rope.scaling.yarn_ext_factor": 0.5,
    "rope.scaling.yarn_attn_factor": 2.0,
    "rope.scaling.yarn_log_multiplier": 0.1,
}


@pytest.mark.parametrize("key", OTHERWISE)
def test_other_computations_are_refused(key: str, tmp_path: Path) -> None:
    """A file whose layers compute something else is refused, and the message names the key."""
    path = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.F32, entries={key: OTHERWISE[key]})
    with pytest.raises(
        ExportError, match=rf"Tiny.gguf: llama.{re.escape(key)} (of .* is not supported; supported is|is 8: its layers)"
    ):
        read_source(path)


def test_keys_that_change_nothing(tmp_path: Path) -> None:
    """The same keys are accepted where their values describe what the builder computes."""
    usual = {"attention.causal": True, "use_parallel_residual": False, "logit_scale": 1.0, "expert_count": 0}
    assert read_source(tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.F32, entries=usual)).origin.name == "Tiny"


def parts(folder: Path, keys_first: bool = False) -> list[Path]:
    """A model in several files, as GGUF's own tools split it."""
    folder.mkdir()
    tiny.gguf(folder / "Tiny-Q8_0.gguf", GGMLQuantizationType.Q8_0, split_max_tensors=8, keys_first=keys_first)
    return sorted(folder.iterdir())


def test_first_part_without_tensors(tmp_path: Path) -> None:
    """The first of several files may have only keys, but without the other files it is no model."""
    first, *rest = parts(tmp_path / "parts", keys_first=True)
    whole = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.Q8_0)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 60)
    np.testing.assert_array_equal(read_source(first).logits(tokens, int), read_source(whole).logits(tokens, int))
    for part in rest:
        part.write_bytes(first.read_bytes())
    with pytest.raises(ExportError, match=r"00001-of-00004.gguf: the GGUF file holds no tensors"):
        read_source(first)
    with pytest.raises(ExportError, match="is one of 4 parts, but not named"):
        read_source(first.rename(tmp_path / "keys.gguf"))


@pytest.mark.parametrize("name", ["x-00001-of-00000.gguf", "x-00001-of-00001.gguf", "x-٠٠٠٠١-of-٠٠٠٠٢.gguf"])
def test_odd_names_are_checked(name: str, tmp_path: Path) -> None:
    """A file is checked whatever its name is."""
    path = tiny.gguf(tmp_path / name, GGMLQuantizationType.F32)
    assert read_source(path).dimensions.layers == tiny.LAYERS
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ExportError, match=r"is not a complete GGUF file: tensor .* lies at bytes"):
        read_source(path)


def test_parts_keep_their_suffix(tmp_path: Path) -> None:
    """The exporter opens the files that it has checked, and none with another suffix beside them."""
    first, *_ = parts(tmp_path / "parts")
    other = first.with_suffix(".bin")
    other.write_bytes(first.read_bytes()[:-40])
    with pytest.raises(ExportError, match=r"00002-of-00003.bin does not exist, one of the 3 parts"):
        read_source(other)


def test_parts_are_one_model(tmp_path: Path) -> None:
    """The first of several files stands for the whole model."""
    first, *rest = parts(tmp_path / "parts")
    assert len(rest) == 2
    assert first.name == "Tiny-Q8_0-00001-of-00003.gguf"
    whole = tiny.gguf(tmp_path / "Tiny.gguf", GGMLQuantizationType.Q8_0)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 60)
    np.testing.assert_array_equal(read_source(first).logits(tokens, int), read_source(whole).logits(tokens, int))
    export(first, tmp_path / "model", Options(max_kl=0.05), lambda label, total: int)
    described = manifest.load(tmp_path / "model")
    assert described.id == "Tiny"
    assert described.quantization.source == "Q8_0"


def test_parts_that_are_not_whole(tmp_path: Path) -> None:
    """A part other than the first, a missing part and a renamed part are refused, each with its own message."""
    first, second, last = parts(tmp_path / "parts")
    with pytest.raises(ExportError, match="is part 2 of 3; give the first"):
        read_source(second)
    renamed = last.rename(last.with_name("else.gguf"))
    with pytest.raises(ExportError, match=r"00003-of-00003.gguf does not exist, one of the 3 parts"):
        read_source(first)
    renamed.rename(last)
    alone = first.rename(first.with_name("Tiny.gguf"))
    with pytest.raises(ExportError, match=r"is one of 3 parts, but not named -00001-of-00003.gguf"):
        read_source(alone)


# Where each block of these types holds its float16 scales.
SCALES_AT = {"Q2_K": [80, 82], "Q3_K": [108], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208], "IQ4_XS": [0]}


def random_blocks(kind: GGMLQuantizationType, shape: tuple[int, ...]) -> np.ndarray:
    """Random blocks of `kind` whose weights are about as large as those of other tiny models."""
    size, width = GGML_QUANT_SIZES[kind]
    blocks = np.random.default_rng(sum(shape)).integers(0, 256, (shape[0], shape[1] // size, width), np.uint8)

    def scaled(scale: float) -> np.ndarray:
        for start in SCALES_AT[kind.name]:
            blocks[..., start : start + 2] = np.frombuffer(np.float16(scale).tobytes(), np.uint8)
        return blocks.reshape(shape[0], -1)

    return scaled(0.1 / float(dequantize(scaled(1.0), kind).std()))


@pytest.mark.parametrize("kind", SCALES_AT)
def test_other_types_are_dequantized(kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of another type can be exported, and computes the same as its dequantized weights."""
    sizes = {"HIDDEN": 256, "INTERMEDIATE": 256, "HEADS": 8}
    for name, size in sizes.items():
        monkeypatch.setattr(tiny, name, size)
    wanted_type, plain = GGMLQuantizationType[kind], tiny.weights("qwen2")

    def blocks(tensor: np.ndarray, kind: GGMLQuantizationType) -> np.ndarray:
        return random_blocks(kind, tensor.shape) if tensor.ndim == 2 else tensor

    monkeypatch.setattr(tiny, "quantize", blocks)
    file = tiny.gguf(tmp_path / f"Tiny.{kind}.gguf", wanted_type, family="qwen2")
    meant = {
        name: dequantize(random_blocks(wanted_type, tensor.shape), wanted_type) if tensor.ndim == 2 else tensor
        for name, tensor in plain.items()
    }
    monkeypatch.setattr(tiny, "weights", lambda *_: meant)
    directory = tiny.hugging_face(tmp_path / "Tiny", "qwen2")
    export(file, tmp_path / "model", Options(quantization="float32"), lambda label, total: int)
    tokens = np.random.default_rng(0).integers(0, tiny.VOCAB, 60)
    actual = Session(tmp_path / "model").forward([tokens], past=[0])
    np.testing.assert_allclose(actual, read_source(directory).logits(tokens, int), atol=1e-3)

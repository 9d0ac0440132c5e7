"""Every form of matrices with every type of activations: how close, on which operators, in which company."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType
from safetensors.numpy import load_file, save_file

from model_export.__main__ import main
from model_export.export import Options, export, read_source
from model_export.graph.precision import MAX_KL, MAX_KL_INT4, Precision, choose_precision
from model_export.graph.quantize import pack
from model_export.verify.verify import perplexity
from service import manifest
from service.engine.cache import Copy
from service.engine.ort.model import Model
from tests.model_export import tiny
from tests.model_export.extended import extend
from tests.model_export.session import Session
from tests.model_export.test_quantize import unpack

# Operators of these graphs that have kernels for GPUs in onnxruntime, in float16 and with these attributes.
PORTABLE = {
    "Add",
    "Cast",
    "Flatten",
    "Gather",
    "GatherBlockQuantized",
    "Gemm",
    "GroupQueryAttention",
    "MatMul",
    "MatMulNBits",
    "Mul",
    "QuickGelu",
    "Reshape",
    "SimplifiedLayerNormalization",
    "SkipSimplifiedLayerNormalization",
    "Split",
}
# The largest mean logit error in standard deviations; random models have far sharper distributions than real ones.
OFF = {"float32": 1e-5, "float16": 0.01, "int8": 0.12, "int4": 0.6}
# With these tokens the vocabulary size is a multiple of 16, the numbers that a processor rounds to float16 at a time.
FILLERS = [f"<|filler_{index}|>" for index in range(-tiny.VOCAB % 16)]

PRECISIONS = [
    (form, activations)
    for form in OFF
    for activations in ("float32", "float16")
    if form in (activations, "int8", "int4")
]


def run(source: Path, directory: Path, **options: object) -> manifest.Manifest:
    """Exports without a progress bar, and with a high `max_kl`, as random models have sharp distributions."""
    return export(source, directory, Options(**{"max_kl": 2.0} | options), lambda label, total: lambda: None)


def text(length: int, seed: int = 0) -> np.ndarray:
    """Random tokens."""
    return np.random.default_rng(seed).integers(0, tiny.VOCAB, length)


def sources(folder: Path) -> list[Path]:
    """A float source with norms of queries and keys, a float source with biases, and one in 4-bit blocks."""
    return [
        tiny.hugging_face(folder / "Qwen3", "qwen3", tie_word_embeddings=False),
        tiny.hugging_face(folder / "Qwen2", "qwen2"),
        tiny.gguf(folder / "Llama.gguf", GGMLQuantizationType.Q4_1),
    ]


@pytest.mark.parametrize(("form", "activations"), PRECISIONS)
def test_close_to_the_source(form: str, activations: str, tmp_path: Path) -> None:
    """Every precision computes the same as its source up to rounding, and its manifest names the precision."""
    for index, source in enumerate(sources(tmp_path)):
        directory = tmp_path / f"model-{index}"
        described = run(source, directory, quantization=form, activations=activations)
        assert (described.quantization.weights, described.quantization.activations) == (form, activations)
        assert described.kv.dtype == activations
        session, tokens = Session(directory), text(64)
        wanted = read_source(source).logits(tokens, lambda: None)
        actual = session.forward([tokens], past=[0])
        assert actual.dtype == np.float32
        assert {cache.dtype for cache in session.caches.values()} == {np.dtype(activations)}
        assert np.abs(actual - wanted).mean() < OFF[form] * wanted.std()


@pytest.mark.parametrize(("form", "activations"), PRECISIONS)
def test_the_same_bits_in_any_company(form: str, activations: str, tmp_path: Path) -> None:
    """The service's model gives a sequence bit-equal logits in any chunks, batches and copied slots."""
    source = extend(tiny.hugging_face(tmp_path / "Tiny"), *FILLERS)
    described = run(source, tmp_path / "model", quantization=form, activations=activations)
    model = Model(tmp_path / "model", described, slots=5, context_length=128, threads=2, batch_invariant=True)
    tokens, lengths = text(60).tolist(), [60, 7, 12, 3, 39]
    whole = model.forward(0, [tokens], [0], [(0, 59)]).copy()
    for start in range(0, 60, 20):
        chunked = model.forward(1, [tokens[start : start + 20]], [start], [(0, 19)])
    np.testing.assert_array_equal(chunked, whole)
    model.copy([Copy(source=0, target=slot, length=length) for slot, length in enumerate(lengths) if slot])
    for seed in range(5):
        new = text(5, seed=seed).tolist()
        together = model.forward(0, [[token] for token in new], lengths, [(row, 0) for row in range(5)]).copy()
        alone = model.forward(0, [[new[0]]], [60], [(0, 0)])
        np.testing.assert_array_equal(alone[0], together[0])


@pytest.mark.parametrize("form", ["float16", "int8", "int4"])
def test_float16_takes_operators_that_gpus_have(form: str, tmp_path: Path) -> None:
    """A float16 graph has no operator that only the CPU has, and no float32 number."""
    for index, source in enumerate(sources(tmp_path)):
        directory = tmp_path / f"model-{index}"
        run(source, directory, quantization=form, activations="float16")
        graph = ir.load(directory / "model.onnx").graph
        assert {node.op_type for node in graph} <= PORTABLE
        assert ir.DataType.FLOAT not in {value.dtype for value in graph.initializers.values()}
        levels = {node.attributes["accuracy_level"].as_int() for node in graph if node.op_type == "MatMulNBits"}
        assert levels <= {0}


@pytest.mark.parametrize("activations", ["float32", "float16"])
@pytest.mark.parametrize("form", ["int8", "int4"])
@pytest.mark.parametrize("tied", [True, False])
def test_embedding_and_output_table_are_quantized(tied: bool, form: str, activations: str, tmp_path: Path) -> None:
    """A model that is almost only vocabulary takes 8 bits per weight; in float16 a tied table is stored once."""
    source = tiny.hugging_face(tmp_path / "Tiny", tie_word_embeddings=tied)
    run(source, tmp_path / "model", quantization=form, activations=activations)
    graph = ir.load(tmp_path / "model" / "model.onnx").graph
    (look_up,) = (node for node in graph if node.op_type.startswith("Gather") and "embd" in (node.inputs[0].name or ""))
    assert look_up.op_type == "GatherBlockQuantized"
    tables = [value for value in graph.initializers.values() if value.shape and tiny.VOCAB in value.shape.numpy()]
    assert {value.dtype for value in tables if value.const_value and value.const_value.size > 16 * tiny.VOCAB} == {
        ir.DataType.UINT8
    }


def test_rounding_to_four_bits_errs_least() -> None:
    """The search has under 0.92 of the squared error of rounding to 15 even steps with zero; zeros stay zero."""
    weights = np.random.default_rng(4).normal(0, 1, (64, 320)).astype(np.float32)
    rounded = unpack(pack(weights, "int4")).reshape(weights.shape)
    parts = weights.reshape(64, -1, 32)
    step = np.ptp(parts, axis=-1, keepdims=True) / 15
    zero = np.rint(-parts.min(axis=-1, keepdims=True) / step)
    plain = (np.clip(np.rint(parts / step) + zero, 0, 15) - zero) * step
    assert np.square(rounded - weights).sum() < 0.92 * np.square(plain - parts).sum()
    np.testing.assert_array_equal(unpack(pack(np.zeros((2, 64), np.float32), "int4")), 0)


@pytest.mark.parametrize("offset", [3.0, -3.0])
def test_rounding_far_from_zero(offset: float) -> None:
    """Blocks that are all above or all below zero move by no more than a step of 1/15 of their largest weight."""
    weights = np.random.default_rng(4).uniform(-1, 1, (8, 64)).astype(np.float32) + np.float32(offset)
    rounded = unpack(pack(weights, "int4")).reshape(weights.shape)
    assert np.abs(rounded - weights).max() <= 4 / 15


def test_what_auto_takes() -> None:
    """`auto` depends on the device and the source; plain matrices decide the type of the activations."""
    assert choose_precision("auto", "auto", "Q4_1") == Precision("int8", "float32")
    assert choose_precision("auto", "float16", "bfloat16") == Precision("int8", "float16")
    assert choose_precision("float16", "auto", "float32") == Precision("float16", "float16")
    assert choose_precision("auto", "auto", "Q4_0", "cuda") == Precision("int4", "float16")
    assert choose_precision("auto", "auto", "Q4_1", "cuda") == Precision("float16", "float16")


def test_the_bound_is_wider_only_where_four_bits_round() -> None:
    """Sources in Q4_0 keep their blocks in int4."""
    bounds = {source: choose_precision("int4", "auto", source).max_kl for source in ("Q4_0", "Q4_1", "Q8_0")}
    assert bounds == {"Q4_0": MAX_KL, "Q4_1": MAX_KL_INT4, "Q8_0": MAX_KL_INT4}


REFUSED = {
    "plain in another type": (["--quantization", "float32", "--activations", "float16"], "float32 computes in float32"),
    "too far": (["--quantization", "int4"], "at most 0.1 allowed): KL "),
    "few tokens": (["--verify-tokens", "63"], "--verify-tokens 63 is too few, expected at least 64"),
    "no marks": (["--fim-order", "spm"], "--fim-order spm needs fill-in-the-middle tokens"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that cannot be combined, and too large divergences, end in one sentence and write nothing."""
    arguments, message = REFUSED[case]
    source, out = tiny.hugging_face(tmp_path / "Tiny"), tmp_path / "out"
    assert main([str(source), str(out / "model"), *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not out.exists() or [path.name for path in out.iterdir()] == ["model.refused"] * (case == "too far")


def test_too_far_says_what_would_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the bound that the error message offers, the same export succeeds."""
    source, arguments = tiny.hugging_face(tmp_path / "Tiny"), ["--quantization", "int4"]
    assert main([str(source), str(tmp_path / "model"), *arguments]) == 2
    bound = capsys.readouterr().err.split("--max-kl ")[1].split()[0]
    assert main([str(source), str(tmp_path / "model"), *arguments, "--max-kl", bound]) == 0


def test_numbers_beyond_float16(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A weight outside the range of float16 is an error that names its tensor."""
    source = tiny.hugging_face(tmp_path / "Tiny")
    rewrite(source, "model.norm.weight", lambda scale: scale * 1e6)
    assert main([str(source), str(tmp_path / "out" / "model"), "--quantization", "float16"]) == 2
    assert "output_norm.weight holds " in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def rewrite(directory: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    """Changes one tensor of a Hugging Face directory."""
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        if name in tensors:
            save_file(tensors | {name: change(tensors[name])}, path)


def test_perplexity_by_hand() -> None:
    """A token has the probability of the logits before it: here 1/2 and 1/8, so the perplexity is 4."""
    logits = np.log(np.array([[0.25, 0.5, 0.25], [0.125, 0.5, 0.375], [1, 1, 1]], np.float32))
    assert perplexity(logits, np.array([2, 1, 0]), np.arange(3)) == pytest.approx(4)
    assert perplexity(logits[:1], np.array([2, 1, 0]), np.array([0])) == pytest.approx(2)


def test_report_is_printed_and_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Size, logit error, perplexity and speed against the source's are printed, and are in the manifest."""
    source = tiny.hugging_face(tmp_path / "Tiny")
    assert main([str(source), str(tmp_path / "model"), "--max-kl", "0.1"]) == 0
    quality = manifest.load(tmp_path / "model").quality
    assert quality.source.bytes == sum(path.stat().st_size for path in source.glob("*.safetensors"))
    files = [path for path in (tmp_path / "model").iterdir() if path.name != "manifest.json"]
    assert quality.export.bytes == sum(path.stat().st_size for path in files)
    assert 0 < quality.mean_logit_error < quality.max_logit_error
    assert quality.export.perplexity == pytest.approx(quality.source.perplexity, rel=0.1)
    assert quality.source.generated_per_second is None
    printed = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in printed[1:]}
    assert f"{quality.source.perplexity:.3f}" in rows["perplexity"]
    assert f"{quality.export.perplexity:.3f}" in rows["perplexity"]
    assert rows["size"].count("MiB") == rows["prefill"].count("tokens/s") == 2
    assert rows["decode"].split()[1] == "-"
    assert f"mean {quality.mean_logit_error:.4f} max {quality.max_logit_error:.4f}" in rows["KL"]

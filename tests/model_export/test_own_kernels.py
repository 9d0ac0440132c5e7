"""Graphs over our own operators: exactly the source's model, or one sentence."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType

from model_export.__main__ import main
from model_export.errors import ExportError
from model_export.graph.initializers import ALIGNMENT, Initializers
from model_export.graph.precision import precision_of_own_kernels
from model_export.graph.quantize import Form
from model_export.native.kernels import obstacle
from model_export.opening import check_before_download, read_source
from model_export.room import graph_bytes
from model_export.sources.gguf.read import open_header
from model_export.verify.report import table
from model_export.verify.verify import kl_divergence
from service import manifest
from service.engine.ort.model import Model
from service.host import kernels
from tests.model_export import tiny
from tests.model_export.test_export import expected, run, text
from tests.model_export.test_room import large  # noqa: F401 - a fixture
from tests.support.reference_kernels import ReferenceCpu, ReferenceSession

# A vocabulary of a multiple of 32 tokens.
UNUSED = -tiny.VOCAB % 32
TYPES = {"Q4_0": 576, "Q4_1": 640, "Q8_0": 1088}

needs_library = pytest.mark.skipif(kernels.why_not() is not None, reason=f"own kernels: {kernels.why_not()}")


def source(folder: Path, kind: str = "Q4_1", **options: object) -> Path:
    return tiny.gguf(folder / "Tiny.gguf", GGMLQuantizationType[kind], unused_tokens=UNUSED, **options)


def built(path: Path, folder: Path, kv: str = "float16") -> Path:
    """The graph of a source, without an export, which needs the library."""
    folder.mkdir()
    with (folder / manifest.WEIGHTS_FILE).open("wb") as file:
        graph = read_source(path).build_over_kernels(kv, Initializers(file), lambda: None)
        ir.save(graph, folder / manifest.MODEL_FILE)
    return folder


def logits(session, tokens: np.ndarray, capacity: int = 64) -> np.ndarray:
    """The logits after each of `tokens`, in one call."""
    declared = {value.name: value for value in session.get_inputs()}
    kv = declared["past_key.0"]
    dtype = np.float16 if kv.type == "tensor(float16)" else np.float32
    binding, found = session.io_binding(), np.empty((len(tokens), tiny.VOCAB + UNUSED), np.float32)
    feeds = {
        "input_ids": tokens[None],
        "seqlens_k": np.array([len(tokens) - 1], np.int32),
        "query_seqlens": np.array([len(tokens)], np.int32),
        "total_sequence_length": np.array([len(tokens)], np.int32),
        "logits_idx": np.arange(len(tokens)),
    }
    caches = {name: np.zeros((1, kv.shape[1], capacity, kv.shape[3]), dtype) for name in declared if "past" in name}
    for name, array in {**feeds, **caches}.items():
        binding.bind_input(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)
    for name, array in {"logits": found, **caches}.items():
        place = ("cpu", 0, array.dtype, array.shape, array.ctypes.data)
        binding.bind_output(name.replace("past", "present"), *place)
    session.run_with_iobinding(binding)
    return found


@pytest.mark.parametrize("kv", ["float16", "float32"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", TYPES)
def test_the_graph_is_the_source(kind: str, tied: bool, kv: str, tmp_path: Path) -> None:
    """Computed without rounding activations, its logits are those of the source's weights."""
    path, tokens = source(tmp_path, kind, tied=tied), text(40)
    graph = built(path, tmp_path / "model", kv)
    found = logits(ReferenceSession(ir.load(graph / manifest.MODEL_FILE)), tokens)
    np.testing.assert_allclose(found, expected(path, tokens), atol=0.05 if kv == "float16" else 1e-4)


def test_weights_lie_once_and_at_pages(tmp_path: Path) -> None:
    """A tied table is one tensor in tiles of the file's type, and all tensors start at pages."""
    graph = ir.load(built(source(tmp_path), tmp_path / "model") / manifest.MODEL_FILE).graph
    stored = {name: value.const_value for name, value in graph.initializers.items()}
    assert {tensor.offset % ALIGNMENT for tensor in stored.values()} == {0}
    tiles = {name: tuple(tensor.shape) for name, tensor in stored.items() if tensor.dtype == ir.DataType.UINT8}
    assert len(tiles) == 1 + 4 * tiny.LAYERS
    assert {shape[-1] for shape in tiles.values()} == {TYPES["Q4_1"]}
    assert tiles["blk.1.ffn_gate+ffn_up"][:2] == (2 * tiny.INTERMEDIATE // 32, tiny.HIDDEN // 32)
    assert [node.op_type for node in graph] == ["EmbeddingLookup", *["DecoderLayerHalf"] * tiny.LAYERS, "Head"]


@pytest.mark.usefixtures("large")
@pytest.mark.parametrize(("kind", "form"), [("Q4_1", "int4"), ("Q8_0", "int8")])
def test_estimated_size(kind: str, form: Form, tmp_path: Path) -> None:
    """The weights take about what the check of room expects, and not much more."""
    path = source(tmp_path, kind)
    size = (built(path, tmp_path / "model") / manifest.WEIGHTS_FILE).stat().st_size
    precision = precision_of_own_kernels(kind, "auto")
    assert precision.form == form
    assert 0.85 * size < graph_bytes(read_source(path).dimensions, precision) < 1.15 * size


@pytest.mark.parametrize(
    ("family", "said"),
    [
        ("qwen2", "biases"),
        ("qwen3", "norms of queries and keys"),
        ("seed_oss", "biases"),
        ("gemma3", "norms of queries and keys"),
        ("smollm3", "layers without rotation"),
    ],
)
def test_families_that_do_not_fit(family: str, said: str, tmp_path: Path) -> None:
    """The sentence names what own kernels do not compute."""
    path = source(tmp_path, family=family, layers=4)
    with pytest.raises(ExportError, match=f"own kernels do not compute {said}.*use --kernels stock"):
        built(path, tmp_path / "model")


@pytest.mark.parametrize("head_dim", [16, 48, 288])
def test_heads_that_do_not_fit(head_dim: int, tmp_path: Path) -> None:
    """Sizes of heads that the library refuses are refused before a graph is built."""
    checkpoint = read_source(source(tmp_path)).checkpoint
    plain, tensors = checkpoint.architecture, checkpoint.tensors
    rotary = replace(plain.rotary, frequencies=np.ones(head_dim // 2))
    assert obstacle(plain, tensors) is None
    reason = f"own kernels do not compute heads of {head_dim} numbers, which this model has"
    assert obstacle(replace(plain, head_dim=head_dim, rotary=rotary), tensors) == reason


def test_a_source_in_floats(tmp_path: Path) -> None:
    """Its matrices have no tiles."""
    path = tiny.hugging_face(tmp_path / "source")
    with pytest.raises(ExportError, match=r"token_embd\.weight is not in blocks of Q4_0, Q4_1 or Q8_0 alone"):
        built(path, tmp_path / "model")
    odd = tiny.gguf(tmp_path / "Odd.gguf", GGMLQuantizationType.Q4_0)
    with pytest.raises(
        ExportError, match=r"token_embd\.weight has shape \[260, 64\], and own kernels need multiples of"
    ):
        built(odd, tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--kernels own --device cuda", "--kernels own cannot be used: own kernels run on CPUs, and --device is cuda"),
        (
            "--kernels own --quantization int8",
            "own kernels keep the source's blocks as they are, and --quantization is",
        ),
        ("--kernels own --activations float16", "own kernels compute in float32, and --activations is float16"),
        ("--kernels stock --kv-cache float16", "--kv-cache float16 needs own kernels: --kernels is stock"),
        ("--quantization int8 --kv-cache float16", "--kv-cache float16 needs own kernels: own kernels keep the"),
    ],
)
def test_options_that_do_not_fit(options: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence says which, and nothing is written."""
    assert main([str(source(tmp_path)), str(tmp_path / "model"), *options.split()]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "model").exists()


def test_without_the_library(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The export says why before it builds anything."""
    monkeypatch.setattr(kernels, "why_not", lambda: "this processor lacks AVX2")
    assert main([str(source(tmp_path)), str(tmp_path / "model"), "--kernels", "own"]) == 2
    assert capsys.readouterr().err == "model_export: --kernels own cannot be used: this processor lacks AVX2\n"


def chosen(path: Path, folder: Path, **options: object) -> manifest.Manifest:
    """The manifest of an export that chooses the kernels itself."""
    return manifest.read(run(path, folder, **options))


@needs_library
def test_auto_takes_own_kernels(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Where they compute the model, the default export is over them, and says so."""
    assert main([str(source(tmp_path)), str(tmp_path / "model"), "--max-kl", "0.05"]) == 0
    described = manifest.read(tmp_path / "model")
    assert (described.kernels, described.why_stock) == ("own", None)
    assert "int4 matrices, float32 activations, own kernels, float16 KV cache; " in capsys.readouterr().out


@needs_library
@pytest.mark.parametrize(
    ("family", "options", "why"),
    [
        ("qwen2", {}, "own kernels do not compute biases, which this model has"),
        ("llama", {"device": "cuda"}, "own kernels run on CPUs, and --device is cuda"),
        (
            "llama",
            {"quantization": "int8"},
            "own kernels keep the source's blocks as they are, and --quantization is int8",
        ),
    ],
)
def test_auto_takes_stock_kernels(family: str, options: dict[str, str], why: str, tmp_path: Path) -> None:
    """Elsewhere it is over onnxruntime's, and the manifest has the reason, which its report shows."""
    described = chosen(source(tmp_path, "Q4_0", family=family), tmp_path / "model", **options)
    assert (described.kernels, described.why_stock, described.kv.tile) == ("stock", why, 1)
    assert f", stock kernels ({why}); over " in table(described)


def test_auto_without_the_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the processor lacks is a reason too; where stock kernels were asked for there is none."""
    monkeypatch.setattr(kernels, "why_not", lambda: "this processor lacks AVX2")
    path = source(tmp_path)
    assert chosen(path, tmp_path / "auto").why_stock == "this processor lacks AVX2"
    asked = chosen(path, tmp_path / "stock", kernels="stock")
    assert (asked.kernels, asked.why_stock, asked.computed_by) == ("stock", None, "stock kernels")


@pytest.mark.parametrize(
    ("family", "kind", "why"),
    [
        ("llama", "Q4_1", None),
        ("qwen2", "Q4_1", "own kernels do not compute biases"),
        ("llama", "F16", r"token_embd\.weight is not in blocks of Q4_0"),
    ],
)
def test_before_the_weights_are_there(family: str, kind: str, why: str | None, tmp_path: Path) -> None:
    """Whether own kernels compute a model on the hub is known from the beginning of its file."""
    path = source(tmp_path, kind, family=family)
    size, first = path.stat().st_size, open_header(path).tensors[0]
    weights = first.data.ctypes.data - np.frombuffer(first.mapping, np.uint8).ctypes.data
    os.truncate(path, weights)
    os.truncate(path, size)  # what follows the header is a hole
    check_before_download(path)
    if why is None:
        check_before_download(path, own_kernels=True)
    else:
        with pytest.raises(ExportError, match=f"--kernels own cannot be used: {why}"):
            check_before_download(path, own_kernels=True)


def test_a_directory_before_its_weights_are_there(tmp_path: Path) -> None:
    """Safetensors have no blocks."""
    path = tiny.hugging_face(tmp_path / "source")
    with pytest.raises(ExportError, match="own kernels take the blocks of GGUF files, and this is a directory"):
        check_before_download(path, own_kernels=True)


@needs_library
@pytest.mark.parametrize("kv", ["float16", "float32"])
@pytest.mark.parametrize("kind", TYPES)
def test_an_export(kind: str, kv: str, tmp_path: Path) -> None:
    """The directory declares its kernels and KV cache, and the service's model of it computes what numpy does."""
    exported = run(source(tmp_path, kind), tmp_path / "model", kernels="own", kv_cache=kv)
    described = manifest.load(exported)
    assert (described.kernels, described.devices, described.kv.dtype, described.kv.tile) == ("own", ("cpu",), kv, 16)
    assert not described.quantization.pads_lone_row
    tokens, shape = text(40), {"slots": 3, "context_length": 64, "threads": 2, "batch_invariant": True}
    real, reference = Model(exported, described, **shape), Model(exported, described, **shape, device=ReferenceCpu())
    for past in (0, 20):
        rows, at = [tokens[past : past + 20].tolist()] * 2, [(0, 19), (1, 0), (1, 19)]
        found = real.forward(1, rows, [past, past], at)
        # Activations have 8 bits.
        assert kl_divergence(reference.forward(1, rows, [past, past], at), found) < 0.05

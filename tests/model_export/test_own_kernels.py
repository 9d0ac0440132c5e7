"""Graphs over our own operators: exactly the source's model, or one sentence."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from gguf import GGMLQuantizationType

from model_export.__main__ import main
from model_export.errors import ExportError
from model_export.graph.initializers import ALIGNMENT, Initializers
from model_export.graph.operators import LinearForm
from model_export.graph.precision import precision_of_own_kernels
from model_export.native.kernels import obstacle
from model_export.opening import read_source
from model_export.room import decode_form, graph_bytes
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
def test_estimated_size(kind: str, form: LinearForm, tmp_path: Path) -> None:
    """The weights take about what the check of room expects, and not much more."""
    path = source(tmp_path, kind)
    size = (built(path, tmp_path / "model") / manifest.WEIGHTS_FILE).stat().st_size
    precision = precision_of_own_kernels("auto", "auto", kind, "cpu", "auto")
    assert decode_form(precision, kind) == form
    assert 0.85 * size < graph_bytes(read_source(path).dimensions, precision, form) < 1.15 * size


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
    plain = read_source(source(tmp_path)).checkpoint.architecture
    rotary = replace(plain.rotary, frequencies=np.ones(head_dim // 2))
    assert obstacle(plain) is None
    assert obstacle(replace(plain, head_dim=head_dim, rotary=rotary)) == f"heads of {head_dim} numbers"


def test_a_source_in_floats(tmp_path: Path) -> None:
    """Its matrices have no tiles."""
    path = tiny.hugging_face(tmp_path / "source")
    with pytest.raises(ExportError, match=r"token_embd\.weight has 260 rows, own kernels need a multiple of 32"):
        built(path, tmp_path / "model")
    with pytest.raises(ExportError, match=r"token_embd\.weight is not in blocks of Q4_0, Q4_1 or Q8_0 alone"):
        built(source(tmp_path, "F16"), tmp_path / "again")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--kernels own --device cuda", "--kernels own has no kernels for --device cuda, only for cpu"),
        ("--kernels own --quantization int8", "--kernels own keeps the source's blocks as they are, so it has no"),
        ("--kernels own --activations float16", "--kernels own computes in float32"),
        ("--kernels own --prompts int8", "--kernels own has one graph for all calls, so it has no --prompts int8"),
        ("--kv-cache float16", "--kv-cache float16 needs --kernels own"),
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
    assert capsys.readouterr().err == "model_export: --kernels own cannot be used here: this processor lacks AVX2\n"


@needs_library
@pytest.mark.parametrize("kv", ["float16", "float32"])
@pytest.mark.parametrize("kind", TYPES)
def test_an_export(kind: str, kv: str, tmp_path: Path) -> None:
    """The directory declares its kernels and KV cache, and the service's model of it computes what numpy does."""
    exported = run(source(tmp_path, kind), tmp_path / "model", kernels="own", kv_cache=kv)
    described = manifest.load(exported)
    assert (described.kernels, described.devices, described.kv.dtype, described.kv.tile) == ("own", ("cpu",), kv, 16)
    assert (described.quantization.min_rows, described.quantization.min_logits) == (1, 1)
    assert described.quantization.prompts is None
    tokens, shape = text(40), {"slots": 3, "context_length": 64, "threads": 2, "batch_invariant": True}
    real, reference = Model(exported, described, **shape), Model(exported, described, **shape, device=ReferenceCpu())
    for past in (0, 20):
        rows, at = [tokens[past : past + 20].tolist()] * 2, [(0, 19), (1, 0), (1, 19)]
        found = real.forward(1, rows, [past, past], at)
        # Activations have 8 bits.
        assert kl_divergence(reference.forward(1, rows, [past, past], at), found) < 0.05

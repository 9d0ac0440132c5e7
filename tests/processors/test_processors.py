"""What must hold on any processor: `make test` shows it on this one, `make test-processors` on emulated ones."""

from __future__ import annotations

import itertools
import os
import platform
from pathlib import Path

import grpc
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from completion.v1 import completion_pb2 as pb
from completion.v1 import completion_pb2_grpc
from gguf import GGMLQuantizationType
from onnx_ir.tape import Tape

from model_export.export import Options, export
from model_export.opening import read_source
from service import manifest
from service.engine.cache import Copy
from service.engine.ort.model import Model
from service.host.processor import EXACT_BYTES_OPTION, byte_options, processor
from service.settings import Settings
from tests.model_export import tiny
from tests.model_export.session import Session
from tests.support.ports import free_ports
from tests.support.stack import AUTHORIZED, ServiceThread

# The processor that these tests are emulated on, by qemu's name for it.
EMULATED = os.environ.get("EMULATED_PROCESSOR")
SLOTS = 9
FORMS = ["int4", "int8", "float32"]
PAIRS = 64
# The sum of two products of 255 and 127 exceeds 16 bits.
LARGEST = 255 * 127
CLIPPED = 32767


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random model in 4-bit blocks."""
    return tiny.gguf(tmp_path_factory.mktemp("source") / "Tiny.gguf", GGMLQuantizationType.Q4_0)


@pytest.fixture(scope="module", params=FORMS)
def directory(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model exported in a form, over onnxruntime's operators."""
    options = Options(quantization=request.param, max_kl=0.05)
    target = tmp_path_factory.mktemp("model") / request.param
    export(source, target, options, lambda *_: lambda: None)
    return target


@pytest.fixture(scope="module")
def model(directory: Path) -> Model:
    described = manifest.load(directory)
    return Model(directory, described, slots=SLOTS, context_length=160, threads=2, batch_invariant=True)


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return np.random.default_rng(3).integers(0, tiny.VOCAB, 140).tolist()


def product_of_bytes(options: dict[str, str]) -> int:
    """A sum of 2 * PAIRS products of an unsigned 255 and a signed 127, as onnxruntime computes it."""
    tape = Tape()
    value = ir.val("value", dtype=ir.DataType.UINT8, shape=ir.Shape([4, 2 * PAIRS]))
    weights = ir.tensor(np.full((2 * PAIRS, 32), 127, np.int8), name="weights")
    zeros = [ir.tensor(np.zeros((), kind), name=kind.__name__) for kind in (np.uint8, np.int8)]
    stored = [ir.val(tensor.name, const_value=tensor) for tensor in (weights, *zeros)]
    total = tape.op("MatMulInteger", [value, *stored])
    total.dtype, total.shape = ir.DataType.INT32, ir.Shape([4, 32])
    graph = ir.Graph([value], [total], nodes=tape.nodes, initializers=stored, opset_imports={"": 21}, name="product")
    session_options = onnxruntime.SessionOptions()
    for name, setting in options.items():
        session_options.add_session_config_entry(name, setting)
    serialized = ir.to_proto(ir.Model(graph, ir_version=10)).SerializeToString()
    session = onnxruntime.InferenceSession(serialized, session_options, providers=["CPUExecutionProvider"])
    (sums,) = np.unique(session.run(None, {"value": np.full((4, 2 * PAIRS), 255, np.uint8)})[0])
    return int(sums)


def test_products_of_bytes_are_exact() -> None:
    """With the options that every session has, no sum of products of bytes is clipped."""
    assert product_of_bytes(byte_options()) == 2 * PAIRS * LARGEST


@pytest.mark.skipif(platform.machine() != "x86_64", reason="only x86-64 has kernels that clip")
def test_what_the_processor_says_is_what_it_computes() -> None:
    """Without the options, sums are clipped exactly on processors without 8-bit dot products."""
    exact = product_of_bytes({}) == 2 * PAIRS * LARGEST
    assert exact == (processor().byte_dot_products or processor().instructions in {"baseline", "AVX"})


@pytest.mark.skipif(EMULATED != "Haswell", reason="not emulated: make test-processors")
def test_the_emulated_kernels_are_those_of_avx2() -> None:
    """The results show that the kernels have no dot products: sums of two products are clipped at 16 bits."""
    assert product_of_bytes({}) == PAIRS * CLIPPED
    assert product_of_bytes({EXACT_BYTES_OPTION: "1"}) == 2 * PAIRS * LARGEST
    assert (processor().instructions, processor().byte_dot_products) == ("AVX2", False)


@pytest.mark.skipif(EMULATED != "neoverse-n1", reason="not emulated: make test-processors")
def test_the_emulated_kernels_are_those_of_arm64() -> None:
    """Python, numpy and onnxruntime are those of arm64, and the processor reports its dot products."""
    assert platform.machine() == "aarch64"
    assert (processor().instructions, processor().byte_dot_products) == ("NEON", True)


@pytest.mark.skipif(
    processor().instructions not in {"AVX-512", "AMX"} or not processor().byte_dot_products,
    reason="not run: AVX-512 with VNNI",
)
def test_dot_products_give_the_bits_of_unsigned_products(source: Path, tmp_path: Path) -> None:
    """A graph in 8 bits gives bit-equal results with VNNI and with the unsigned products of other processors."""
    options = Options(quantization="int8", max_kl=0.05)
    export(source, tmp_path / "model", options, lambda *_: lambda: None)
    text = np.random.default_rng(1).integers(0, tiny.VOCAB, 100)
    signed, unsigned = (
        Session(tmp_path / "model", options=choice).forward([text], past=[0])
        for choice in ({}, {EXACT_BYTES_OPTION: "1"})
    )
    np.testing.assert_array_equal(signed, unsigned)


def prompt(model: Model, slot: int, tokens: list[int], cuts: list[int]) -> np.ndarray:
    """Runs the prefill of a prompt in a slot, split at `cuts`; returns the last logits."""
    for start, end in itertools.pairwise([0, *cuts, len(tokens)]):
        logits = model.forward(slot, [tokens[start:end]], [start], [(0, end - start - 1)])
    return logits[0].copy()


@pytest.mark.parametrize("cuts", [[64, 128], [2, 100], [138], [43], [33, 35, 99]])
def test_prompts_in_any_cut(model: Model, directory: Path, tokens: list[int], cuts: list[int]) -> None:
    """The logits after a prompt are bit-equal for any split into chunks, but for float32 on arm64: there nearly so."""
    whole, cut = prompt(model, 0, tokens, []), prompt(model, 1, tokens, cuts)
    if platform.machine() == "aarch64" and manifest.load(directory).quantization.weights == "float32":
        np.testing.assert_allclose(cut, whole, atol=1e-5, rtol=0)
    else:
        np.testing.assert_array_equal(cut, whole)


def test_decoding_alone_and_in_batches(model: Model, tokens: list[int]) -> None:
    """A token's logits are bit-equal alone and in batches of every size, in every slot."""
    prompt(model, 0, tokens[:40], [])
    model.copy([Copy(source=0, target=slot, length=40) for slot in range(1, SLOTS)])
    alone = model.forward(0, [[5]], [40], [(0, 0)])[0].copy()
    for rows in range(2, SLOTS + 1):
        batch = model.forward(0, [[5]] * rows, [40] * rows, [(row, 0) for row in range(rows)])
        for row in batch:
            np.testing.assert_array_equal(row, alone)


def test_logits_are_the_sources(model: Model, source: Path, tokens: list[int]) -> None:
    """The exported model's logits correlate with its source in numpy, which those of wrong kernels would not."""
    expected = read_source(source).logits(np.array(tokens), lambda: None)[-1]
    actual = prompt(model, 0, tokens, [])
    assert np.corrcoef(expected, actual)[0, 1] > 0.95


def test_a_request(directory: Path, model: Model, tokens: list[int]) -> None:
    """A completion over gRPC begins with the token that the model finds likeliest; a stream gives the same text."""
    (port,) = free_ports(1)
    settings = Settings(model_dir=directory, port=port, metrics_port=0, threads=2, max_running=2)
    with ServiceThread(settings), grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        stub = completion_pb2_grpc.CompletionServiceStub(channel)
        request = pb.CreateCompletionRequest(
            model="Tiny", tokens=pb.Tokens(ids=tokens[:30]), max_tokens=6, temperature=0, ignore_eos=True, logprobs=2
        )
        answer = stub.CreateCompletion(request, metadata=list(AUTHORIZED.items()))
        pieces = list(stub.StreamCompletion(request, metadata=list(AUTHORIZED.items())))
    logits = prompt(model, 0, tokens[:30], []).astype(np.float64)
    best = logits.max() - np.logaddexp.reduce(logits)
    assert answer.usage.completion_tokens == 6
    assert answer.choices[0].logprobs.token_logprobs[0].logprob == pytest.approx(best, abs=1e-5)
    assert "".join(piece.choices[0].text for piece in pieces if piece.choices) == answer.choices[0].text

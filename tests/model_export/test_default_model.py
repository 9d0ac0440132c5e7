"""The exported default model against its source weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from deploy import local
from model_export.opening import read_source
from model_export.sources.weights import Floats
from model_export.verify.verify import kl_divergence
from service import manifest
from service.host import kernels
from tests.model_export.session import Session

# Long enough that no single position dominates the mean: at some positions the divergence is a tenth of a nat.
HELD_OUT = Path(__file__).with_name("held_out.txt").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def session(model_dir: Path) -> Session:
    """The default model with room for one row."""
    return Session(model_dir, rows=1, capacity=640)


@pytest.fixture(scope="module")
def tokens(model_dir: Path) -> np.ndarray:
    """The tokens of a text that the exporter does not use for its own comparison."""
    return np.array(Tokenizer.from_file(str(model_dir / "tokenizer.json")).encode(HELD_OUT).ids)


@pytest.fixture(scope="module")
def expected(tokens: np.ndarray) -> Floats:
    """The logits of the source weights after each token."""
    return read_source(local.default_weights()).logits(tokens, lambda: None)


def test_default_model_keeps_its_distribution(session: Session, tokens: np.ndarray, expected: Floats) -> None:
    """On a held-out text the default model is within 0.005 nats per token of its source."""
    assert kl_divergence(expected, session.forward([tokens], past=[0])) <= 0.005


def test_default_model_reads_in_chunks(session: Session, tokens: np.ndarray) -> None:
    """Chunks of any size of at least two tokens give bit-equal logits."""
    tokens = tokens[:136]
    whole = session.forward([tokens], past=[0])
    starts = range(0, len(tokens) - 1, 7)
    ends = [*list(starts)[1:], len(tokens)]
    parts = [session.forward([tokens[start:end]], past=[start]) for start, end in zip(starts, ends, strict=True)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)


def test_default_model_special_tokens(model_dir: Path) -> None:
    """The default model ends at the tokens at which llama.cpp ends it, and keeps its 4-bit blocks."""
    described = manifest.load(model_dir)
    assert described.id == "SmolLM2-135M-Instruct"
    assert described.special_tokens.end == (0, 2, 4)  # end of text, end of turn, and <reponame>
    assert described.special_tokens.default_prompt == 0
    if kernels.why_not() is None:
        assert (described.kernels, described.quantization.weights) == ("own", "int4")
    else:
        assert (described.kernels, described.quantization.weights) == ("stock", "int8")
    assert described.quality.kl <= 0.005

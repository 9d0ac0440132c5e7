"""What the comparison with the source runs and compares."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from model_export.export import Options, export
from model_export.opening import read_source
from model_export.verify import verify
from model_export.verify.runner import Runner
from service import manifest
from tests.model_export import tiny
from tests.model_export.test_export import run, text


@pytest.mark.parametrize(("weights", "tokens"), [(1, 1024), (10**9, 1024), (7 * 10**9, 314), (7 * 10**10, 128)])
def test_large_models_run_fewer_tokens(weights: int, tokens: int) -> None:
    """The time of a run is bounded, except that a few tokens are always run."""
    assert verify.default_tokens(weights) == tokens


@pytest.mark.parametrize(
    ("tokens", "vocabulary", "count"),
    [(1024, 32_000, 1024), (1024, 128_256, 261), (642, 49_152, 642), (128, 152_064, 128), (128, 10**6, 64), (2, 10, 2)],
)
def test_positions_to_compare(tokens: int, vocabulary: int, count: int) -> None:
    """Positions are distinct, spread over the text, with all of the last ones, and their logits stay small."""
    positions = verify.positions_to_compare(tokens, vocabulary)
    assert len(positions) == count
    assert len(set(positions)) == count
    assert (positions[0], positions[-1]) == (0, tokens - 1)
    assert (np.diff(positions) >= 1).all()
    assert np.diff(positions).max(initial=1) <= -(-tokens // max(1, count - 32))
    last = positions[-32:]
    np.testing.assert_array_equal(last, np.arange(tokens)[-len(last) :])


def test_logits_at_some_positions(tmp_path: Path) -> None:
    """Source and export give the same logits at some positions as at all, in one call and in chunks."""
    path = tiny.hugging_face(tmp_path / "Tiny", "qwen3", tie_word_embeddings=False)
    source, tokens, positions = read_source(path), text(50), np.array([0, 3, 29, 49])
    whole = source.logits(tokens, lambda: None)
    np.testing.assert_allclose(source.logits_at(tokens, positions, lambda: None), whole[positions], atol=1e-5)
    runner = Runner(run(path, tmp_path / "model", quantization="float32") / "model.onnx", 50)
    np.testing.assert_allclose(runner.logits(tokens, [50], positions), whole[positions], atol=2e-4)
    np.testing.assert_allclose(runner.logits(tokens, [20, 8, 22], positions), whole[positions], atol=2e-4)
    stepwise, rate = runner.decode(tokens, 4)
    np.testing.assert_allclose(stepwise, whole[-4:], atol=2e-4)
    assert rate > 0


def test_fewer_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`--verify-tokens` shortens the comparison. It and the builds take as many steps as they announced."""
    monkeypatch.setattr(tiny, "INTERMEDIATE", 32)  # so that a table takes about as long as a layer
    source, calls, announced = tiny.hugging_face(tmp_path / "Tiny"), [], {}

    def progress(label: str, total: int) -> Callable[[], object]:
        announced[label] = total
        return lambda: calls.append(label)

    options = Options(max_kl=0.5, verify_tokens=64, quantization="int8")
    export(source, tmp_path / "model", options, progress)
    assert manifest.load(tmp_path / "model").quality.tokens == 64
    assert {label: calls.count(label) for label in announced} == announced
    assert announced == {"building": 4, "verifying": 10}


def test_few_positions_give_nearly_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With too little room for the logits of all tokens, those of some are compared."""
    source = tiny.hugging_face(tmp_path / "Tiny")
    every = manifest.load(run(source, tmp_path / "all", quantization="int8")).quality
    monkeypatch.setattr(verify, "LOGITS_BYTES", 80 * 4 * tiny.VOCAB)
    some = manifest.load(run(source, tmp_path / "some", quantization="int8")).quality
    assert (every.tokens, some.tokens) == (tiny.CONTEXT, 80)
    assert some.kl == pytest.approx(every.kl, rel=0.5)
    assert some.decode_kl == pytest.approx(every.decode_kl, rel=1e-3)

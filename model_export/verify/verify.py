"""Compares an exported model with its source weights on real text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_export.errors import ExportError, TooFarError
from model_export.graph.source import Source
from model_export.sources.panics import told_as
from model_export.sources.weights import Floats
from model_export.verify.report import Report
from model_export.verify.runner import Runner

TEXT = Path(__file__).with_name("verification_text.txt")
MAX_TOKENS = 1024
CHUNK = 128
DECODED = 32
MOST_SURPRISE = 700.0  # its exponential is still a number


def verify(
    source: Source,
    model: Path,
    prompts: Path | None,
    max_kl: float,
    on_layer: Callable[[], object],
    *,
    rounded: bool = True,
) -> Report:
    """Measures `model`, and the `prompts` graph if it has one, against `source`.

    Raises TooFarError when a divergence from the source exceeds `max_kl` nats per token, that of a text read in chunks
    by either graph or decoded, and ExportError when a text read in chunks is as far from the same text read whole. Only
    what is `rounded` may be let through by a larger bound.
    """
    tokens = _tokens(source)
    began = time.perf_counter()
    expected = source.logits(tokens, on_layer)
    source_rate = len(tokens) / (time.perf_counter() - began)
    runner = Runner(model, len(tokens), prompts)
    whole = runner.logits(tokens, [len(tokens)])
    if not (np.isfinite(expected).all() and np.isfinite(whole).all()):
        raise ExportError(f"{source.name}: its weights are so large that logits are not finite")
    prompted = runner.logits(tokens, _chunks(len(tokens), CHUNK))
    if not kl_divergence(whole, prompted) <= max_kl:
        raise ExportError(
            f"the exported model reads chunks differently: {kl_divergence(whole, prompted)} nats/token off"
        )
    decoded = min(DECODED, len(tokens) - 1)
    single = runner.logits(tokens, [len(tokens) - decoded] + [1] * decoded)[-decoded:]
    chunked = prompted if prompts is None else Runner(model, len(tokens)).logits(tokens, _chunks(len(tokens), CHUNK))
    read_rate, generated_rate = runner.tokens_per_second(tokens, CHUNK, decoded)
    report = Report(
        tokens=len(tokens),
        kl=kl_divergence(expected, chunked),
        prompt_kl=kl_divergence(expected, prompted),
        decode_kl=kl_divergence(expected[-decoded:], single),
        mean_logit_error=float(np.abs(chunked - expected).mean()),
        max_logit_error=float(np.abs(chunked - expected).max()),
        source_perplexity=perplexity(expected, tokens),
        perplexity=perplexity(chunked, tokens),
        source_read_per_second=source_rate,
        read_per_second=read_rate,
        generated_per_second=generated_rate,
    )
    farthest = max(report.kl, report.prompt_kl, report.decode_kl)
    if not farthest <= max_kl:
        raise TooFarError(_too_far(report, farthest, max_kl, rounded))
    return report


def _too_far(report: Report, farthest: float, max_kl: float, rounded: bool) -> str:
    if not math.isfinite(farthest):
        return f"the exported model gives no finite logits: {report}; choose another --quantization or --activations"
    far = f"the exported model is too far from its source (at most {max_kl} allowed): {report}"
    if not rounded:
        return f"{far}; nothing was rounded, so the graph does not compute what this variant of its family does"
    return f"{far}; choose another --quantization, or --max-kl {math.ceil(farthest * 100) / 100:g} to take it as it is"


def kl_divergence(expected: Floats, actual: Floats) -> float:
    """The mean divergence of softmax(`actual`) from softmax(`expected`), both [tokens, vocab], in nats per token."""
    total = 0.0
    for one, other in zip(expected, actual, strict=True):
        log_p, log_q = _log_softmax(one), _log_softmax(other)
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total / len(expected)


def perplexity(logits: Floats, tokens: NDArray[np.int64]) -> float:
    """The perplexity of `tokens` [tokens], all but the first, by the `logits` [tokens, vocab] after each."""
    surprise = [-float(_log_softmax(row)[token]) for row, token in zip(logits, tokens[1:], strict=False)]
    return math.exp(min(sum(surprise) / len(surprise), MOST_SURPRISE))


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    log_probabilities: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return log_probabilities


def _tokens(source: Source) -> NDArray[np.int64]:
    limit = min(MAX_TOKENS, source.dimensions.context_length)
    vocabulary = source.vocabulary
    with told_as(f"{source.name}: its tokenizer fails on plain text"):
        ids = vocabulary.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if vocabulary.add_bos and vocabulary.bos is not None:
        ids = [vocabulary.bos, *ids]
    if len(ids) < 2:
        raise ExportError(f"{source.name}: its tokenizer makes {len(ids)} tokens of the text to verify it with")
    return np.array(ids[:limit], np.int64)


def _chunks(tokens: int, size: int) -> list[int]:
    return [min(size, tokens - start) for start in range(0, tokens, size)]

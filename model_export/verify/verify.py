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
from model_export.sources.panics import reported_as
from model_export.sources.weights import Floats
from model_export.verify.report import summary
from model_export.verify.runner import Runner
from service.manifest import Measures, Quality

TEXT = Path(__file__).with_name("verification_text.txt")
MAX_TOKENS = 1024
CHUNK = 128
DECODED = 32
MOST_SURPRISE = 700.0  # the exponential of more would overflow


def verify(
    source: Source,
    model: Path,
    prefill: Path | None,
    max_kl: float,
    on_layer: Callable[[], object],
    *,
    rounded: bool = True,
) -> Quality:
    """Measures the decode graph `model`, and the `prefill` graph if there is one, against `source`.

    The files beside `model` are those of the export. Raises TooFarError when a divergence from the source exceeds
    `max_kl` nats per token: prefill by either graph, or decode steps. Raises ExportError when prefill in chunks is that
    far from prefill in one call. The message offers a larger bound only where weights were `rounded`.
    """
    tokens = _tokens(source)
    began = time.perf_counter()
    expected = source.logits(tokens, on_layer)
    source_rate = len(tokens) / (time.perf_counter() - began)
    runner = Runner(model, len(tokens), prefill)
    in_one_call = runner.logits(tokens, [len(tokens)])
    if not (np.isfinite(expected).all() and np.isfinite(in_one_call).all()):
        raise ExportError(f"{source.origin.name}: its weights are so large that logits are not finite")
    chunks = [min(CHUNK, len(tokens) - start) for start in range(0, len(tokens), CHUNK)]
    prefilled = runner.logits(tokens, chunks)
    divergence = kl_divergence(in_one_call, prefilled)
    if not divergence <= max_kl:
        raise ExportError(f"the exported model's prefill in chunks is {divergence} nats/token off, more than {max_kl}")
    decoded = min(DECODED, len(tokens) - 1)
    stepwise = runner.logits(tokens, [len(tokens) - decoded] + [1] * decoded)[-decoded:]
    by_model = prefilled if prefill is None else Runner(model, len(tokens)).logits(tokens, chunks)
    prefill_rate, decode_rate = runner.tokens_per_second(tokens, CHUNK, decoded)
    kl, prompt_kl = kl_divergence(expected, by_model), kl_divergence(expected, prefilled)
    decode_kl = kl_divergence(expected[-decoded:], stepwise)
    quality = Quality(
        tokens=len(tokens),
        kl=kl,
        prompt_kl=prompt_kl,
        decode_kl=decode_kl,
        mean_logit_error=float(np.abs(by_model - expected).mean()),
        max_logit_error=float(np.abs(by_model - expected).max()),
        source=Measures(
            bytes=source.origin.size,
            perplexity=perplexity(expected, tokens),
            read_per_second=source_rate,
            generated_per_second=None,
        ),
        export=Measures(
            bytes=sum(file.stat().st_size for file in model.parent.iterdir()),
            perplexity=perplexity(by_model, tokens),
            read_per_second=prefill_rate,
            generated_per_second=decode_rate,
        ),
    )
    farthest = max(kl, prompt_kl, decode_kl)
    if not farthest <= max_kl:
        raise TooFarError(_too_far(quality, farthest, max_kl, rounded))
    return quality


def _too_far(quality: Quality, farthest: float, max_kl: float, rounded: bool) -> str:
    measured = f"{summary(quality)}, over {quality.tokens} tokens"
    if not math.isfinite(farthest):
        return f"the exported model gives no finite logits: {measured}; choose another --quantization or --activations"
    far = f"the exported model is too far from its source (at most {max_kl} allowed): {measured}"
    if not rounded:
        return f"{far}; nothing was rounded, so the graph does not compute what this variant of its family does"
    return f"{far}; choose another --quantization, or --max-kl {math.ceil(farthest * 100) / 100:g} to take it as it is"


def kl_divergence(expected: Floats, actual: Floats) -> float:
    """The mean KL divergence of softmax(`actual`) from softmax(`expected`), both [tokens, vocab], in nats per token."""
    total = 0.0
    for expected_row, actual_row in zip(expected, actual, strict=True):
        log_p, log_q = _log_softmax(expected_row), _log_softmax(actual_row)
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total / len(expected)


def perplexity(logits: Floats, tokens: NDArray[np.int64]) -> float:
    """The perplexity of all `tokens` [tokens] but the first, by the `logits` [tokens, vocab] after each token."""
    surprise = [-float(_log_softmax(row)[token]) for row, token in zip(logits, tokens[1:], strict=False)]
    return math.exp(min(sum(surprise) / len(surprise), MOST_SURPRISE))


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    log_probabilities: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return log_probabilities


def _tokens(source: Source) -> NDArray[np.int64]:
    limit = min(MAX_TOKENS, source.dimensions.context_length)
    vocabulary = source.origin.vocabulary
    with reported_as(f"{source.origin.name}: its tokenizer fails on plain text"):
        ids = vocabulary.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if vocabulary.add_bos and vocabulary.bos is not None:
        ids = [vocabulary.bos, *ids]
    if len(ids) < 2:
        raise ExportError(f"{source.origin.name}: its tokenizer makes {len(ids)} tokens of the text to verify it with")
    return np.array(ids[:limit], np.int64)

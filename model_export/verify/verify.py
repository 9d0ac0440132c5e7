"""Compares an exported model with its source weights on real text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_export.errors import ExportError, TooFarError
from model_export.graph.source import SelectiveSource, Source
from model_export.sources.panics import reported_as
from model_export.sources.weights import Floats
from model_export.verify.report import summary
from model_export.verify.runner import Runner
from service.quality import Measures, Quality

TEXT = Path(__file__).with_name("verification_text.txt")
MAX_TOKENS = 1024
# The fewest tokens that may be run, and the fewest that are run by default.
MIN_TOKENS, FEWEST_TOKENS = 64, 128
# The most products of a token and a weight in one run by default: 1024 tokens up to 2 billion weights.
MOST_PRODUCTS = 1 << 41
LOGITS_BYTES = 128 << 20
CHUNK = 128
DECODED = 32
MOST_SURPRISE = 700.0  # the exponential of more would overflow


def verify(
    source: Source,
    model: Path,
    max_kl: float,
    on_step: Callable[[], object],
    *,
    rounded: bool = True,
    most_tokens: int | None = None,
    own_kernels: bool = False,
) -> Quality:
    """Measures the graph `model` against `source`.

    It runs at most `most_tokens` tokens, by default MAX_TOKENS, or fewer in models so large that they would take too
    long (see `default_tokens`), and compares the logits after some of them: see `positions_to_compare`. At no time are
    there more than three arrays of such logits. Calls `on_step` `steps` times. With `own_kernels` the graph needs our
    own operators.

    The files beside `model` are those of the export. Raises TooFarError when a divergence from the source exceeds
    `max_kl` nats per token: that of prefill, or of decode steps. Raises ExportError when prefill in chunks is that far
    from prefill in one call. The message offers a larger bound only where weights were `rounded`.
    """
    tokens = verification_tokens(source, most_tokens or default_tokens(source.dimensions.layer_weights))
    decoded = min(DECODED, len(tokens) - 1)
    positions = positions_to_compare(len(tokens), source.dimensions.vocab_size)

    def step() -> None:
        for _ in range(source.dimensions.layers):
            on_step()

    began = time.perf_counter()
    expected = _source_logits(source, tokens, positions, on_step)
    source_rate = len(tokens) / (time.perf_counter() - began)
    runner = Runner(model, len(tokens), own_kernels=own_kernels)
    in_one_call = runner.logits(tokens, [len(tokens)], positions)
    if not (np.isfinite(expected).all() and np.isfinite(in_one_call).all()):
        raise ExportError(f"{source.origin.name}: its weights are so large that logits are not finite")
    step()
    chunk = min(CHUNK, max(2, -(-len(tokens) // 2)))
    chunks = [min(chunk, len(tokens) - start) for start in range(0, len(tokens), chunk)]
    prefilled = runner.logits(tokens, chunks, positions)
    divergence = kl_divergence(in_one_call, prefilled)
    if not divergence <= max_kl:
        raise ExportError(f"the exported model's prefill in chunks is {divergence} nats/token off, more than {max_kl}")
    del in_one_call
    step()
    kl = kl_divergence(expected, prefilled)
    prefill_rate = runner.prefill_rate(tokens[:-decoded], chunk)
    step()
    stepwise, decode_rate = runner.decode(tokens, decoded)
    step()
    decode_kl = kl_divergence(expected[-decoded:], stepwise)
    mean_error, max_error = _errors(expected, prefilled)
    quality = Quality(
        tokens=len(positions),
        kl=kl,
        decode_kl=decode_kl,
        mean_logit_error=mean_error,
        max_logit_error=max_error,
        source=Measures(
            bytes=source.origin.size,
            perplexity=perplexity(expected, tokens, positions),
            read_per_second=source_rate,
            generated_per_second=None,
        ),
        export=Measures(
            bytes=sum(file.stat().st_size for file in model.parent.iterdir()),
            perplexity=perplexity(prefilled, tokens, positions),
            read_per_second=prefill_rate,
            generated_per_second=decode_rate,
        ),
    )
    farthest = max(kl, decode_kl)
    if not farthest <= max_kl:
        usable = rounded and math.isfinite(farthest)
        remedy = "use --kernels stock" if own_kernels else "choose another --quantization"
        raise TooFarError(_too_far(quality, farthest, max_kl, rounded, remedy), quality if usable else None)
    return quality


def steps(layers: int) -> int:
    """How many steps of about the same length `verify` has for a model of that many layers."""
    return 5 * layers


def verification_tokens(source: Source, most: int) -> NDArray[np.int64]:
    """The first tokens, at most `most`, of the text that exports are verified with.

    Raises ExportError where the tokenizer makes fewer than two of it.
    """
    limit = min(most, source.dimensions.context_length)
    vocabulary = source.origin.vocabulary
    with reported_as(f"{source.origin.path}: its tokenizer fails on plain text"):
        ids = vocabulary.tokenizer.encode(TEXT.read_text(encoding="utf-8"), add_special_tokens=False).ids
    if vocabulary.add_bos and vocabulary.bos is not None:
        ids = [vocabulary.bos, *ids]
    if len(ids) < 2:
        raise ExportError(f"{source.origin.path}: its tokenizer makes {len(ids)} tokens of the text to verify it with")
    return np.array(ids[:limit], np.int64)


def default_tokens(layer_weights: int) -> int:
    """How many tokens to run through a model whose layers have that many weights, so that the time is bounded.

    Only the fewest take a time that grows with the model.
    """
    return min(MAX_TOKENS, max(FEWEST_TOKENS, MOST_PRODUCTS // max(1, layer_weights)))


def positions_to_compare(tokens: int, vocab_size: int) -> NDArray[np.int64]:
    """The positions, ascending, of a text of that many tokens whose logits are compared.

    These are all while their logits take at most LOGITS_BYTES; otherwise as many as that, at least twice DECODED: the
    last DECODED, and others at even distances before them.
    """
    count = max(2 * DECODED, LOGITS_BYTES // (4 * vocab_size))
    if count >= tokens:
        return np.arange(tokens)
    spread = np.arange(count - DECODED) * (tokens - DECODED) // (count - DECODED)
    return np.concatenate([spread, np.arange(tokens - DECODED, tokens)])


def _source_logits(
    source: Source, tokens: NDArray[np.int64], positions: NDArray[np.int64], on_layer: Callable[[], object]
) -> Floats:
    if isinstance(source, SelectiveSource):
        return source.logits_at(tokens, positions, on_layer)
    return source.logits(tokens, on_layer)[positions]


def _errors(expected: Floats, actual: Floats) -> tuple[float, float]:
    """The mean and the largest error of logits, both [tokens, vocab]."""
    rows = [np.abs(one - other) for one, other in zip(expected, actual, strict=True)]
    return float(np.mean([row.mean() for row in rows])), float(max(row.max() for row in rows))


def _too_far(quality: Quality, farthest: float, max_kl: float, rounded: bool, remedy: str) -> str:
    measured = f"{summary(quality)}, over {quality.tokens} tokens"
    if not math.isfinite(farthest):
        return f"the exported model gives no finite logits: {measured}; choose another --quantization or --activations"
    far = f"the exported model is too far from its source (at most {max_kl} allowed): {measured}"
    if not rounded:
        return f"{far}; nothing was rounded, so the graph does not compute what this variant of its family does"
    return f"{far}; {remedy}, or --max-kl {math.ceil(farthest * 100) / 100:g} to take it as it is"


def kl_divergence(expected: Floats, actual: Floats) -> float:
    """The mean KL divergence of softmax(`actual`) from softmax(`expected`), both [tokens, vocab], in nats per token."""
    total = 0.0
    for expected_row, actual_row in zip(expected, actual, strict=True):
        log_p, log_q = _log_softmax(expected_row), _log_softmax(actual_row)
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total / len(expected)


def perplexity(logits: Floats, tokens: NDArray[np.int64], positions: NDArray[np.int64]) -> float:
    """The perplexity of those `tokens` [tokens] that follow `positions`, by the `logits` [positions, vocab] there."""
    following = zip(logits, positions + 1, strict=True)
    surprise = [-float(_log_softmax(row)[tokens[at]]) for row, at in following if at < len(tokens)]
    return math.exp(min(sum(surprise) / len(surprise), MOST_SURPRISE))


def _log_softmax(logits: Floats) -> NDArray[np.float64]:
    shifted = logits.astype(np.float64) - logits.max()
    log_probabilities: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum())
    return log_probabilities

"""Compares an exported model with its source weights on real text."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from model_export.errors import ExportError, TooFarError
from model_export.panics import told_as
from model_export.runner import Runner
from model_export.source import Source
from model_export.weights import Floats

TEXT = Path(__file__).with_name("verification_text.txt")
MAX_TOKENS = 1024
CHUNK = 128
DECODED = 32


@dataclass(frozen=True)
class Report:
    """How far the exported model is from its source, over the positions of `tokens` tokens.

    `kl` is the mean Kullback-Leibler divergence from the source's next-token distribution, in nats per token, by the
    graph that generates; `prompt_kl` is that by the graph that reads prompts, and `decode_kl` that for the last tokens,
    generated one by one behind such a prompt. Errors are differences of logits, by the graph that generates.
    """

    tokens: int
    kl: float
    prompt_kl: float
    decode_kl: float
    mean_logit_error: float
    max_logit_error: float

    def __str__(self) -> str:
        return (
            f"KL {self.kl:.5f} nats/token ({self.prompt_kl:.5f} prompts, {self.decode_kl:.5f} decoding), "
            f"logit error mean {self.mean_logit_error:.4f} max {self.max_logit_error:.4f}, over {self.tokens} tokens"
        )


def verify(source: Source, model: Path, prompts: Path | None, max_kl: float, on_layer: Callable[[], object]) -> Report:
    """Measures `model`, and the `prompts` graph if it has one, against `source`.

    Raises TooFarError when a divergence from the source exceeds `max_kl` nats per token, that of a text read in chunks
    by either graph or decoded, and ExportError when a text read in chunks is as far from the same text read whole.
    """
    tokens = _tokens(source)
    expected = source.logits(tokens, on_layer)
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
    report = Report(
        tokens=len(tokens),
        kl=kl_divergence(expected, chunked),
        prompt_kl=kl_divergence(expected, prompted),
        decode_kl=kl_divergence(expected[-decoded:], single),
        mean_logit_error=float(np.abs(chunked - expected).mean()),
        max_logit_error=float(np.abs(chunked - expected).max()),
    )
    if not max(report.kl, report.prompt_kl, report.decode_kl) <= max_kl:
        raise TooFarError(f"the exported model is too far from its source (at most {max_kl} allowed): {report}")
    return report


def kl_divergence(expected: Floats, actual: Floats) -> float:
    """The mean divergence of softmax(`actual`) from softmax(`expected`), both [tokens, vocab], in nats per token."""
    total = 0.0
    for one, other in zip(expected, actual, strict=True):
        log_p, log_q = _log_softmax(one), _log_softmax(other)
        total += float(np.sum(np.exp(log_p) * (log_p - log_q)))
    return total / len(expected)


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

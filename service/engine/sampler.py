"""Chooses tokens. Pure functions over one row of logits.

The results are exact: a shortlist of the likeliest tokens is used only where it gives the same token as the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.types import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

# Most distributions reach top_p within this many tokens; only for the others is the whole row sorted.
_CANDIDATES = 64
# Dividing a logit by a smaller penalty would overflow; the divided logit already outweighs all others at this one.
_LEAST_PENALTY = 1e-6


@dataclass(frozen=True, slots=True)
class Shortlist:
    """The top of a row of logits that stays on the device: all logits above some value, descending, equal ones by id.

    `normalizer` is log_normalizer of the whole row. `whole` copies the whole row to the host; it is valid until the
    model's next call.
    """

    ids: Ids
    logits: Floats
    normalizer: float
    whole: Callable[[], Floats]

    @classmethod
    def of(cls, ids: Ids, logits: Floats, normalizer: float, whole: Callable[[], Floats]) -> Shortlist:
        """From the top k logits, descending, with ties in any order.

        Entries equal to the last are dropped: more of them may have been cut off.
        """
        kept = logits > logits[-1]
        order = np.lexsort((ids[kept], -logits[kept]))
        return cls(ids[kept][order], logits[kept][order], normalizer, whole)


Row = Floats | Shortlist


@dataclass(frozen=True, slots=True)
class Score:
    """A token's log probability, and the likeliest tokens, this one included, as (id, log probability), descending."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def log_normalizer(logits: Floats) -> float:
    """log(sum(exp(logits))), in natural logarithms."""
    peak = logits.max()
    return float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))


def whole(row: Row) -> Floats:
    """All logits of a row, on the host."""
    return row.whole() if isinstance(row, Shortlist) else row


def is_finite(row: Row) -> bool:
    """Whether a row's logits are usable: no NaN, no plus infinity, and not all minus infinity."""
    return math.isfinite(row.normalizer if isinstance(row, Shortlist) else row.max())


def score(row: Row, token: int, count: int) -> Score:
    """The model's own score of `token`, before any sampling parameter, with the `count` likeliest tokens."""
    if isinstance(row, Shortlist) and count <= len(row.ids) and token in row.ids:
        values = (row.logits.astype(np.float64) - row.normalizer).astype(np.float32)
        scores: dict[int, float] = dict(zip(row.ids.tolist(), values.tolist(), strict=True))
        likeliest = dict(list(scores.items())[:count]) | {token: scores[token]}
        return Score(scores[token], tuple(likeliest.items()))
    logits = whole(row)
    normalizer = log_normalizer(logits)
    likeliest = _likeliest(logits, count).tolist() if count else []
    ids = likeliest if token in likeliest else [*likeliest, token]
    top = tuple((index, float(np.float32(float(logits[index]) - normalizer))) for index in ids)
    return Score(logprob=dict(top)[token], top=top)


def process(
    row: Row,
    params: SamplingParams,
    prompt: Sequence[int],
    counts: Mapping[int, int],
    banned: Sequence[int],
) -> Row:
    """Applies penalties, bias and bans to a copy of a row of logits, or returns it as it is when there are none.

    `counts` says how often each token was generated; only the repetition penalty looks at `prompt`.
    """
    penalized = params.presence_penalty or params.frequency_penalty
    if not (penalized or params.logit_bias or banned or params.repetition_penalty != 1):
        return row
    logits = whole(row).copy()
    if params.repetition_penalty != 1:
        seen = np.fromiter({*prompt, *counts}, np.int64)
        values = logits[seen]
        penalty = np.float32(max(params.repetition_penalty, _LEAST_PENALTY))
        logits[seen] = np.where(values > 0, values / penalty, values * penalty)
    if penalized and counts:
        ids = np.fromiter(counts.keys(), np.int64, len(counts))
        times = np.fromiter(counts.values(), np.float32, len(counts))
        logits[ids] -= np.float32(params.presence_penalty) + np.float32(params.frequency_penalty) * times
    if params.logit_bias:
        ids = np.fromiter(params.logit_bias.keys(), np.int64, len(params.logit_bias))
        logits[ids] += np.fromiter(params.logit_bias.values(), np.float32, len(params.logit_bias))
    if banned:
        logits[np.asarray(banned, np.int64)] = -np.inf
    return logits


def uniform(seed: int, stream: int, position: int) -> float:
    """The random number in [0, 1) for one position: a pure function of its arguments, by counter-based Philox."""
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, stream], np.uint64)
    bits = np.random.Philox(key=key, counter=[position, 0, 0, 0])
    return float(np.random.Generator(bits).random())


def choose(row: Row, params: SamplingParams, u: float) -> int:
    """The token at quantile `u` of the distribution after temperature, top_k, top_p and min_p, in that order.

    top_p is a share of the probability that top_k leaves. Of equally likely tokens the lower id goes first.
    """
    if isinstance(row, Shortlist):
        chosen = _choose_among(row, params, u)
        if chosen is not None:
            return chosen
    logits = whole(row)
    if params.greedy or params.top_k == 1 or params.top_p == 0:
        return int(logits.argmax())
    scaled = logits * np.float32(1 / params.temperature)
    weights = np.exp(scaled - scaled.max())
    if not params.top_k and params.top_p >= 1 and params.min_p <= 0:
        return _quantile(weights, u)
    ids, kept = _filter(weights, params)
    return int(ids[_quantile(kept, u)])


def _choose_among(row: Shortlist, params: SamplingParams, u: float) -> int | None:
    """The result of `choose`, or None when the filters may keep tokens outside the shortlist."""
    if not len(row.ids):
        return None
    if params.greedy or params.top_k == 1 or params.top_p == 0:
        return int(row.ids[0])
    scaled = row.logits * np.float32(1 / params.temperature)
    weights, count, total = np.exp(scaled - scaled[0]), params.top_k or len(scaled), None
    if not params.top_k:
        if params.top_p < 1 and params.temperature != 1:
            return None  # the normalizer holds only for temperature 1
        total = math.exp(row.normalizer - float(row.logits[0]))
    if count > len(weights) or (total is not None and not _covers(weights, total, params, top_k_cuts_nothing=True)):
        return None
    ids, kept = _cut(row.ids[:count], weights[:count], total, params)
    return int(ids[_quantile(kept, u)])


def _quantile(weights: Floats, u: float) -> int:
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return index if index < len(weights) else int(np.flatnonzero(weights)[-1])  # rounding may carry u past the end


def _filter(weights: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """The ids that top_k, top_p and min_p keep, likeliest first, and their weights."""
    vocabulary = len(weights)
    limit = min(params.top_k or vocabulary, vocabulary)
    total = float(weights.sum(dtype=np.float64))
    ids = _likeliest(weights, min(limit, _CANDIDATES))
    if len(ids) < limit and not _covers(weights[ids], total, params, top_k_cuts_nothing=limit == vocabulary):
        ids = _likeliest(weights, limit)
    return _cut(ids, weights[ids], total if limit == vocabulary else None, params)


def _cut(ids: Ids, kept: Floats, total: float | None, params: SamplingParams) -> tuple[Ids, Floats]:
    """What top_p and min_p keep of tokens with the weights `kept`, likeliest first.

    top_p is a share of `total`, or of the sum of `kept` when that is None.
    """
    if params.top_p < 1:
        cumulative = np.cumsum(kept, dtype=np.float64)
        mass = float(cumulative[-1]) if total is None else total
        count = int(np.searchsorted(cumulative, params.top_p * mass, side="left")) + 1
        ids, kept = ids[:count], kept[:count]
    if params.min_p > 0:
        count = int(np.count_nonzero(kept >= params.min_p * kept[0]))
        ids, kept = ids[:count], kept[:count]
    return ids, kept


def _covers(kept: Floats, total: float, params: SamplingParams, *, top_k_cuts_nothing: bool) -> bool:
    """Whether the filters keep no token outside these candidates, whose weights are `kept`."""
    if params.min_p > 0 and kept[-1] < params.min_p * kept[0] and (top_k_cuts_nothing or params.top_p >= 1):
        return True
    return top_k_cuts_nothing and float(kept.sum(dtype=np.float64)) >= params.top_p * total and params.top_p < 1


def _likeliest(values: Floats, count: int) -> Ids:
    """The indices of the `count` largest values, largest first, equal values by index."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        ids = np.flatnonzero(values >= threshold)
    else:
        ids = np.arange(len(values))
    order = np.lexsort((ids, -values[ids]))
    return ids[order[:count]].astype(np.int64)

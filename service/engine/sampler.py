"""Chooses tokens. Pure functions over one row of logits.

The results are exact: a shortlist of the likeliest tokens is used only where it gives the same token as the whole row.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.engine.scores import Score
from service.types import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]
Sums = npt.NDArray[np.float64]

# Most distributions reach top_p within this many tokens; only for the others is the whole row sorted. Fewer candidates
# would hardly be faster: what takes the time is the partition of the row.
_CANDIDATES = 4096
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


def score(row: Row, token: int, count: int, others: Sequence[int] = ()) -> Score:
    """The model's own score of `token`, before any sampling parameter, with the `count` likeliest and `others`."""
    if isinstance(row, Shortlist) and count <= len(row.ids) and token in row.ids:
        values = (row.logits.astype(np.float64) - row.normalizer).astype(np.float32)
        scores: dict[int, float] = dict(zip(row.ids.tolist(), values.tolist(), strict=True))
        likeliest = dict(list(scores.items())[:count]) | {token: scores[token]}
        of_others = _logprobs(row.whole(), row.normalizer, others) if others else ()
        return Score(scores[token], tuple(likeliest.items()), of_others)
    logits = whole(row)
    normalizer = log_normalizer(logits)
    likeliest = _likeliest(logits, count).tolist() if count else []
    ids = likeliest if token in likeliest else [*likeliest, token]
    top = tuple(zip(ids, _logprobs(logits, normalizer, ids), strict=True))
    return Score(logprob=dict(top)[token], top=top, others=_logprobs(logits, normalizer, others))


def _logprobs(logits: Floats, normalizer: float, ids: Sequence[int]) -> tuple[float, ...]:
    """The log probabilities of some tokens."""
    return tuple(float(np.float32(float(logits[index]) - normalizer)) for index in ids)


def process(
    row: Row,
    params: SamplingParams,
    prompt: Sequence[int],
    counts: Mapping[int, int],
    banned: Sequence[int] | Ids,
    *,
    allowed: Sequence[int] = (),
) -> Row:
    """Applies penalties, bias and bans to a copy of a row of logits, or returns it as it is when there are none.

    `counts` says how often each token was generated; only the repetition penalty looks at `prompt`. A token that is
    banned, or not `allowed` where some are, gets minus infinity, so the result is of no use where none is left.
    """
    penalized = params.presence_penalty or params.frequency_penalty
    if not (penalized or params.logit_bias or len(banned) or allowed or params.repetition_penalty != 1):
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
    if allowed:
        ids = np.asarray(allowed, np.int64)
        kept = logits[ids]
        logits.fill(-np.inf)
        logits[ids] = kept
    if len(banned):
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
        return _quantile(np.cumsum(weights, dtype=np.float64), u)
    kept, cumulative = _filter(weights, params)
    return _at_rank(weights, kept, _quantile(cumulative, u))


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
    if count > len(weights):
        return None
    kept = weights[:count]
    cumulative = np.cumsum(kept, dtype=np.float64)
    if total is not None and not _covers(kept, cumulative, total, params):
        return None
    return int(row.ids[_quantile(_cut(kept, cumulative, total, params), u)])


def _quantile(cumulative: Sums, u: float) -> int:
    """The index of the weight at quantile `u`, from the sums of the weights up to each."""
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    # Rounding may carry u past the end; the last weight that adds to the sum is the one at which the sum is reached.
    return index if index < len(cumulative) else int(np.searchsorted(cumulative, cumulative[-1], side="left"))


def _filter(weights: Floats, params: SamplingParams) -> tuple[Floats, Sums]:
    """The largest weights, descending, and for those of them that top_k, top_p and min_p keep the sums up to each."""
    vocabulary = len(weights)
    limit = min(params.top_k or vocabulary, vocabulary)
    total = float(weights.sum(dtype=np.float64)) if limit == vocabulary and params.top_p < 1 else None
    if limit > _CANDIDATES and (total is not None or params.min_p > 0):
        kept = _largest(weights, _CANDIDATES)
        cumulative = np.cumsum(kept, dtype=np.float64)
        if _covers(kept, cumulative, total, params):
            return kept, _cut(kept, cumulative, total, params)
    kept = _largest(weights, limit)
    return kept, _cut(kept, np.cumsum(kept, dtype=np.float64), total, params)


def _covers(kept: Floats, cumulative: Sums, total: float | None, params: SamplingParams) -> bool:
    """Whether the filters keep no token outside the likeliest ones, whose weights are `kept`. Arguments as for _cut."""
    if params.min_p > 0 and kept[-1] < params.min_p * kept[0] and (total is not None or params.top_p >= 1):
        return True
    return total is not None and params.top_p < 1 and bool(cumulative[-1] >= params.top_p * total)


def _cut(kept: Floats, cumulative: Sums, total: float | None, params: SamplingParams) -> Sums:
    """The part of `cumulative`, the sums of the descending weights `kept`, that belongs to what top_p and min_p keep.

    top_p is a share of `total`, or of the sum of `kept` when that is None.
    """
    count = len(kept)
    if params.top_p < 1:
        mass = float(cumulative[-1]) if total is None else total
        count = int(np.searchsorted(cumulative, params.top_p * mass, side="left")) + 1
    if params.min_p > 0:
        count = min(count, int(np.count_nonzero(kept >= params.min_p * kept[0])))
    return cumulative[:count]


def _largest(weights: Floats, count: int) -> Floats:
    """The `count` largest weights, descending.

    Weights are not negative, so their bits order as they do. numpy sorts integers faster, and numbers without their ids
    several times faster than with them.
    """
    bits = weights.view(np.int32)
    if count < len(bits):
        bits = np.partition(bits, len(bits) - count)[-count:]
    return np.sort(bits)[::-1].view(np.float32)


def _at_rank(weights: Floats, descending: Floats, rank: int) -> int:
    """The id of the weight at `rank` of the largest ones. Of equal weights the lower id goes first."""
    weight = descending[rank]
    larger = int(np.count_nonzero(weights > weight))
    return int(np.flatnonzero(weights == weight)[rank - larger])


def _likeliest(values: Floats, count: int) -> Ids:
    """The indices of the `count` largest values, largest first, equal values by index."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        ids = np.flatnonzero(values >= threshold)
    else:
        ids = np.arange(len(values))
    order = np.lexsort((ids, -values[ids]))
    return ids[order[:count]].astype(np.int64)

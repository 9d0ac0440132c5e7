"""Chooses tokens. Pure functions over one row of logits, exact: nothing is approximated by a shortlist."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from service.types import SamplingParams

Floats = npt.NDArray[np.float32]
Ids = npt.NDArray[np.int64]

# Most distributions reach top_p within this many tokens; the others are sorted whole.
_SHORTLIST = 64
# Dividing by less would overflow; what it favours is certain long before.
_LEAST_PENALTY = 1e-6


@dataclass(frozen=True, slots=True)
class Score:
    """A token's log probability, and the likeliest tokens (with this one) as (id, log probability), falling."""

    logprob: float
    top: tuple[tuple[int, float], ...]


def log_normalizer(logits: Floats) -> float:
    """log(sum(exp(logits))), in natural logarithms."""
    peak = logits.max()
    return float(peak) + float(np.log(np.exp(logits - peak).sum(dtype=np.float64)))


def score(logits: Floats, token: int, count: int) -> Score:
    """The model's own score of `token` among `logits` [vocabulary], with the `count` likeliest tokens."""
    normalizer = log_normalizer(logits)
    likeliest = _likeliest(logits, count).tolist() if count else []
    ids = likeliest if token in likeliest else [*likeliest, token]
    top = tuple((index, float(np.float32(float(logits[index]) - normalizer))) for index in ids)
    return Score(logprob=dict(top)[token], top=top)


def process(
    logits: Floats,
    params: SamplingParams,
    prompt: Sequence[int],
    counts: Mapping[int, int],
    banned: Sequence[int],
) -> Floats:
    """Applies penalties, bias and bans to a copy of `logits`, or returns them as they are when there are none.

    `counts` are the generated tokens; `prompt` matters to the repetition penalty alone.
    """
    penalized = params.presence_penalty or params.frequency_penalty
    if not (penalized or params.logit_bias or banned or params.repetition_penalty != 1):
        return logits
    logits = logits.copy()
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
    """The random number in [0, 1) of one position: a function of its arguments alone, by counter-based Philox."""
    key = np.array([seed & 0xFFFF_FFFF_FFFF_FFFF, stream], np.uint64)
    bits = np.random.Philox(key=key, counter=[position, 0, 0, 0])
    return float(np.random.Generator(bits).random())


def choose(logits: Floats, params: SamplingParams, u: float) -> int:
    """The token at quantile `u` of the distribution that temperature, top_k, top_p and min_p leave.

    Filters apply in that order; top_p is of what top_k left. Ties in probability go to the lower id.
    """
    if params.greedy or params.top_k == 1 or params.top_p == 0:
        return int(logits.argmax())
    scaled = logits * np.float32(1 / params.temperature)
    weights = np.exp(scaled - scaled.max())
    if not params.top_k and params.top_p >= 1 and params.min_p <= 0:
        return _quantile(weights, u)
    ids, kept = _filter(weights, params)
    return int(ids[_quantile(kept, u)])


def _quantile(weights: Floats, u: float) -> int:
    cumulative = np.cumsum(weights, dtype=np.float64)
    index = int(np.searchsorted(cumulative, u * cumulative[-1], side="right"))
    return index if index < len(weights) else int(np.flatnonzero(weights)[-1])  # rounding may carry u past the end


def _filter(weights: Floats, params: SamplingParams) -> tuple[Ids, Floats]:
    """The ids that the filters keep, likeliest first, and their weights."""
    vocabulary = len(weights)
    limit = min(params.top_k or vocabulary, vocabulary)
    total = float(weights.sum(dtype=np.float64))
    ids = _likeliest(weights, min(limit, _SHORTLIST))
    if len(ids) < limit and not _covers(weights[ids], total, params, whole_vocabulary=limit == vocabulary):
        ids = _likeliest(weights, limit)
    kept = weights[ids]
    if params.top_p < 1:
        cumulative = np.cumsum(kept, dtype=np.float64)
        mass = total if limit == vocabulary else float(cumulative[-1])
        count = int(np.searchsorted(cumulative, params.top_p * mass, side="left")) + 1
        ids, kept = ids[:count], kept[:count]
    if params.min_p > 0:
        count = int(np.count_nonzero(kept >= params.min_p * kept[0]))
        ids, kept = ids[:count], kept[:count]
    return ids, kept


def _covers(kept: Floats, total: float, params: SamplingParams, *, whole_vocabulary: bool) -> bool:
    """Whether the filters keep no token beyond this shortlist of the likeliest."""
    if params.min_p > 0 and kept[-1] < params.min_p * kept[0] and (whole_vocabulary or params.top_p >= 1):
        return True
    return whole_vocabulary and float(kept.sum(dtype=np.float64)) >= params.top_p * total and params.top_p < 1


def _likeliest(values: Floats, count: int) -> Ids:
    """The indices of the `count` largest values, largest first, equal ones by index."""
    if count < len(values):
        threshold = np.partition(values, len(values) - count)[len(values) - count]
        ids = np.flatnonzero(values >= threshold)
    else:
        ids = np.arange(len(values))
    order = np.lexsort((ids, -values[ids]))
    return ids[order[:count]].astype(np.int64)

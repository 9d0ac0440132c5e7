"""Sampling from a shortlist of the likeliest tokens gives what the whole row gives, or asks for the whole row."""

from __future__ import annotations

import numpy as np
import pytest

from service.engine import sampler
from service.engine.sampler import Shortlist
from service.types import SamplingParams

VOCABULARY, COUNT = 500, 64


class WantedError(Exception):
    """The whole row was asked for."""


def refuse():
    raise WantedError


def shortlist(logits, count=COUNT, whole=refuse):
    """A row as a GPU returns it."""
    ids = np.argsort(-logits, kind="stable")[:count]
    return Shortlist.of(ids, logits[ids], float(np.float32(sampler.log_normalizer(logits))), whole)


def row(seed, sharpness=3.0):
    return (np.random.default_rng(seed).standard_normal(VOCABULARY) * sharpness).astype(np.float32)


COVERED = [
    {"temperature": 0},
    {"top_k": 1},
    {"top_p": 0},
    {"top_k": 20},
    {"top_k": 20, "temperature": 0.7},
    {"top_k": 63, "top_p": 0.9, "temperature": 1.5},
    {"top_k": 40, "min_p": 0.1},
    {"top_p": 0.9},
    {"top_p": 0.5, "min_p": 0.05},
    {"min_p": 0.2, "temperature": 0.5},
]


@pytest.mark.parametrize("params", COVERED, ids=str)
def test_covered(params):
    """If the filters keep only tokens of the shortlist, it gives the same token as the whole row."""
    chosen = SamplingParams(**{"temperature": 1.0, **params})
    for seed in range(30):
        logits = row(seed, sharpness=4.0)
        for u in (0.0, 0.3, 0.77, 0.999):
            assert sampler.choose(shortlist(logits), chosen, u) == sampler.choose(logits, chosen, u)


NOT_COVERED = [
    {},
    {"top_k": 64},
    {"top_k": 200},
    {"top_p": 0.9, "temperature": 0.9},
    {"top_p": 0.9, "temperature": 0.9, "min_p": 0.3},
    {"min_p": 1e-9},
]


@pytest.mark.parametrize("params", NOT_COVERED, ids=str)
def test_not_covered(params):
    """If the filters may keep more, or the row's total weight is unknown, the whole row is used."""
    chosen = SamplingParams(**{"temperature": 1.0, **params})
    logits = row(3)
    with pytest.raises(WantedError):
        sampler.choose(shortlist(logits), chosen, 0.4)
    whole = shortlist(logits, whole=lambda: logits)
    assert sampler.choose(whole, chosen, 0.4) == sampler.choose(logits, chosen, 0.4)


def test_a_flat_row_is_not_covered_by_top_p():
    """Many tokens about as likely: 64 of them are not nine tenths."""
    flat = row(1, sharpness=0.01)
    with pytest.raises(WantedError):
        sampler.choose(shortlist(flat), SamplingParams(temperature=1, top_p=0.9), 0.4)


def test_equal_logits():
    """Among equals the lower id comes first, and those that may not all be there do not count."""
    logits = np.array([1, 3, 2, 3, 2, 2, 0], np.float32)
    ids = np.array([3, 1, 4, 5])  # a device may give equal ones in any order, and has to leave out one of three
    got = Shortlist.of(ids, logits[ids], 0.0, refuse)
    assert got.ids.tolist() == [1, 3]
    assert sampler.choose(got, SamplingParams(temperature=0), 0.0) == 1
    level = Shortlist.of(np.array([4, 2]), np.zeros(2, np.float32), 0.0, lambda: np.zeros(7, np.float32))
    assert sampler.choose(level, SamplingParams(temperature=0), 0.0) == 0


def test_scores():
    """Log probabilities from the shortlist are the whole row's; a token beyond it, or more of them, need that."""
    logits = row(8)
    token = int(np.argsort(-logits)[10])
    got, expected = sampler.score(shortlist(logits), token, 5), sampler.score(logits, token, 5)
    assert [index for index, _ in got.top] == [index for index, _ in expected.top]
    assert np.allclose([value for _, value in got.top], [value for _, value in expected.top], atol=1e-5)
    assert got.logprob == pytest.approx(expected.logprob, abs=1e-5)
    for other, count in ((int(logits.argmin()), 5), (token, 64)):
        with pytest.raises(WantedError):
            sampler.score(shortlist(logits), other, count)
        assert sampler.score(shortlist(logits, whole=lambda: logits), other, count) == sampler.score(
            logits, other, count
        )


@pytest.mark.parametrize("changes", [{"logit_bias": {1: 2.0}}, {"presence_penalty": 1.0}, {"repetition_penalty": 1.3}])
def test_what_changes_logits_needs_all_of_them(changes):
    """Penalties and bias may lift any token."""
    params = SamplingParams(temperature=0, **changes)
    logits = row(2)
    changed = sampler.process(shortlist(logits, whole=lambda: logits), params, [1, 2], {5: 1}, ())
    assert np.array_equal(changed, sampler.process(logits, params, [1, 2], {5: 1}, ()))
    same = shortlist(logits)
    assert sampler.process(same, SamplingParams(temperature=0), [1], {}, ()) is same


@pytest.mark.parametrize("normalizer", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not(normalizer):
    """One logit that is not a number shows in the normalizer."""
    ids = np.array([1, 0])
    assert not sampler.is_finite(Shortlist.of(ids, np.zeros(2, np.float32), normalizer, refuse))
    assert sampler.is_finite(Shortlist.of(ids, np.zeros(2, np.float32), 1.0, refuse))

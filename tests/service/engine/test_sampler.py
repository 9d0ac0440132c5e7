"""Sampler: what is chosen, on vectors that can be worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine import sampler
from service.types import SamplingParams

# Their weights at temperature 1 are 4, 2, 1, 1: the probabilities 1/2, 1/4, 1/8, 1/8.
LOGITS = np.log(np.array([2, 4, 1, 1], np.float32))
# Quantiles in the middle of sixteen equal parts of [0, 1): each part is one sixteenth of the probability.
SIXTEENTHS = [(index + 0.5) / 16 for index in range(16)]


def array(*values):
    return np.array(values, np.float32)


def drawn(logits=LOGITS, **params):
    """How many sixteenths of the probability each token has."""
    tokens = [sampler.choose(logits, SamplingParams(**params), u) for u in SIXTEENTHS]
    return [tokens.count(token) for token in range(len(logits))]


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({}, [4, 8, 2, 2]),
        ({"temperature": 0}, [0, 16, 0, 0]),
        ({"temperature": 1e-8}, [0, 16, 0, 0]),
        ({"temperature": 1e-4}, [0, 16, 0, 0]),
        ({"temperature": 2}, [4, 6, 3, 3]),  # weights 1.4, 2, 1, 1 of 5.4
        ({"top_k": 1}, [0, 16, 0, 0]),
        ({"top_k": 3}, [5, 9, 2, 0]),  # weights 4, 2, 1 of 7 by falling probability; of equal ones the lower id
        ({"top_k": 9}, [4, 8, 2, 2]),
        ({"top_p": 0}, [0, 16, 0, 0]),
        ({"top_p": 0.5}, [0, 16, 0, 0]),
        ({"top_p": 0.51}, [5, 11, 0, 0]),
        ({"top_p": 0.875}, [5, 9, 2, 0]),
        ({"top_p": 0.876}, [4, 8, 2, 2]),
        ({"min_p": 0.25}, [4, 8, 2, 2]),
        ({"min_p": 0.26}, [5, 11, 0, 0]),
        ({"min_p": 1}, [0, 16, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [5, 11, 0, 0]),  # of what top_k left, 6/7 is reached by two
        ({"top_p": 0.876, "min_p": 0.5}, [5, 11, 0, 0]),
    ],
)
def test_choice_by_hand(params, expected):
    """Each token is chosen on as many quantiles as its share of what the filters leave."""
    found = drawn(**params)
    assert found == pytest.approx(expected, abs=1)
    assert [count > 0 for count in found] == [count > 0 for count in expected]


def test_ties_go_to_the_lower_id():
    """Greedy choice and every filter agree on it."""
    tied = array(1, 3, 3, 3)
    for params in ({"temperature": 0}, {"top_k": 1}, {"top_p": 0}, {"top_p": 0.1}):
        assert drawn(tied, **params) == [0, 16, 0, 0]
    assert drawn(tied, top_k=2) == [0, 8, 8, 0]


def test_impossible_tokens_are_never_chosen():
    """Minus infinity has no probability, at either end of the quantiles."""
    logits = array(-np.inf, 1, -np.inf, 1, -np.inf)
    for params in ({}, {"top_p": 0.999}, {"top_k": 5}, {"min_p": 0.1}):
        chosen = {sampler.choose(logits, SamplingParams(**params), u) for u in (0.0, 0.25, 0.75, math.nextafter(1, 0))}
        assert chosen == {1, 3}


@pytest.mark.parametrize("top_p", [0.1, 0.5, 0.9])
def test_top_p_beyond_the_shortlist(top_p):
    """If ten thousand tokens are about equally likely, top_p keeps exactly the right thousands."""
    weights = np.arange(10_000, 20_000, dtype=np.float64)
    falling = np.cumsum(weights[::-1]) / weights.sum()
    kept = int(np.searchsorted(falling, top_p)) + 1
    logits = np.log(weights).astype(np.float32)
    params = SamplingParams(top_p=top_p)
    assert sampler.choose(logits, params, math.nextafter(1, 0)) == 10_000 - kept
    assert sampler.choose(logits, params, 0.0) == 9999


def test_top_k_beyond_the_shortlist():
    """The k-th likeliest token can be chosen, the next cannot; top_p is of what top_k left."""
    logits = np.linspace(0, 0.1, 20_000, dtype=np.float32)
    assert sampler.choose(logits, SamplingParams(top_k=6000), math.nextafter(1, 0)) == 14_000
    half = sampler.choose(np.zeros(20_000, np.float32), SamplingParams(top_k=6000, top_p=0.5), math.nextafter(1, 0))
    assert half == 2999


def test_top_p_of_what_top_k_left_beyond_the_shortlist():
    """Of weights 0.9995^i the first 6,000 hold 0.950, and the first 1,289 half of that."""
    logits = (np.arange(20_000) * math.log(0.9995)).astype(np.float32)
    assert sampler.choose(logits, SamplingParams(top_k=6000, top_p=0.5), math.nextafter(1, 0)) == 1288


def by_full_sort(logits, params, u):
    """What `choose` has to give for a temperature above 0 and any filter: the whole row is sorted, then cut."""
    scaled = logits * np.float32(1 / params.temperature)
    weights = np.exp(scaled - scaled.max())
    order = np.lexsort((np.arange(len(weights)), -weights))[: params.top_k or None]
    kept = weights[order]
    cumulative = np.cumsum(kept, dtype=np.float64)
    mass = weights.sum(dtype=np.float64) if len(kept) == len(weights) else cumulative[-1]
    before = np.concatenate(([0.0], cumulative[:-1]))
    stays = (before < params.top_p * mass) if params.top_p < 1 else np.ones(len(kept), bool)
    stays &= kept >= params.min_p * kept[0]
    stays[0] = True
    cumulative = cumulative[stays]
    return int(order[np.searchsorted(cumulative, u * cumulative[-1], side="right")])


# How many tokens hold nine tenths of the probability: a few, up to 4,096, more, or nearly all of them.
SHAPES = {"peaked": (1, 64), "long tail": (65, 4096), "longer tail": (4097, 9000), "flat": (9001, 12_000)}


def shaped(shape, seed, step=0.0, impossible=0.0):
    """12,000 logits in random order, rounded to multiples of `step`, a share `impossible` of them minus infinity."""
    pick = np.random.default_rng(seed)
    ranks = pick.permutation(12_000)
    if shape == "peaked":
        logits = np.where(ranks < 20, 12.0, 0.0) + pick.standard_normal(len(ranks))
    elif shape == "long tail":
        logits = -1.5 * np.log(ranks + 30) + pick.normal(0, 0.3, len(ranks))
    elif shape == "longer tail":
        logits = np.where(ranks < 8000, 5.0, 0.0) + pick.normal(0, 0.3, len(ranks))
    else:
        logits = pick.normal(0, 0.01, len(ranks))
    if step:
        logits = np.round(logits / step) * step
    logits[pick.random(len(ranks)) < impossible] = -np.inf
    return logits.astype(np.float32)


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes(shape):
    """Each shape is what its name says."""
    weights = np.sort(np.exp(shaped(shape, seed=1).astype(np.float64)))[::-1]
    fewest, most = SHAPES[shape]
    assert fewest <= np.searchsorted(np.cumsum(weights), 0.9 * weights.sum()) + 1 <= most


@given(
    shape=st.sampled_from(sorted(SHAPES)),
    seed=st.integers(0, 2**32 - 1),
    step=st.sampled_from([0.0, 0.005, 0.125, 2.0]),
    impossible=st.sampled_from([0.0, 0.3, 0.999]),
    filters=st.fixed_dictionaries(
        {
            "temperature": st.sampled_from([0.3, 1.0, 1.7]),
            "top_p": st.sampled_from([0.3, 0.9, 0.999, 1 - 1e-12, 1.0]),
            "top_k": st.one_of(st.just(0), st.integers(2, 200), st.integers(65, 12_000)),
            "min_p": st.sampled_from([0.0, 1e-5, 0.05, 0.98, 1.0]),
        }
    ).filter(lambda filters: filters["top_k"] or filters["top_p"] < 1 or filters["min_p"]),
)
def test_filters_equal_a_full_sort(shape, seed, step, impossible, filters):
    """However few or many tokens the filters keep, with ties or without, the token is that of a full sort."""
    logits, params = shaped(shape, seed, step, impossible), SamplingParams(**filters)
    for u in (0.0, 0.31, 0.77, 0.9999, math.nextafter(1, 0)):
        assert sampler.choose(logits, params, u) == by_full_sort(logits, params, u)


@pytest.mark.parametrize("count", [4095, 4096, 4097])
@pytest.mark.parametrize("filters", [{"top_p": 0.9}, {"min_p": 0.5}, {"top_k": 4096}, {"top_k": 4097, "min_p": 0.5}])
def test_at_the_edge_of_the_shortlist(count, filters):
    """As many equally likely tokens as a shortlist holds, one fewer or one more: the filters keep the right ones."""
    logits = np.zeros(20_000, np.float32)
    logits[np.random.default_rng(2).permutation(20_000)[:count]] = 20
    params = SamplingParams(**filters)
    for u in (0.0, 0.5, math.nextafter(1, 0)):
        assert sampler.choose(logits, params, u) == by_full_sort(logits, params, u)


@given(
    st.lists(st.integers(-40, 40), min_size=2, max_size=200),
    st.integers(0, 210),
    st.sampled_from([0.3, 0.9, 0.999, 1.0]),
    st.sampled_from([0.0, 0.01, 0.5]),
)
def test_filters_equal_their_definition(values, top_k, top_p, min_p):
    """The shortlist keeps the same tokens as sorting the whole vocabulary."""
    logits = np.array(values, np.float32) / 8
    params = SamplingParams(top_k=min(top_k, len(values)), top_p=top_p, min_p=min_p)
    order = sorted(range(len(values)), key=lambda index: (-logits[index], index))[: params.top_k or None]
    weights = [math.exp(float(logits[index] - logits.max())) for index in order]
    mass, kept = 0.0, []
    for index, weight in zip(order, weights, strict=True):
        if kept and (mass >= top_p * sum(weights) * (1 + 1e-6) or weight < min_p * weights[0] * (1 - 1e-6)):
            break
        kept.append(index)
        mass += weight
    chosen = {sampler.choose(logits, params, u) for u in (0.0, 0.3, 0.6, math.nextafter(1, 0))}
    assert chosen <= set(kept)


def test_distribution_over_quantiles():
    """Over evenly spread quantiles, tokens come as often as softmax says: chi-square far below chance."""
    logits = np.random.default_rng(0).normal(0, 2, 50).astype(np.float32)
    expected = np.exp(logits.astype(np.float64))
    expected *= 5000 / expected.sum()
    counts = np.bincount(
        [sampler.choose(logits, SamplingParams(), (index + 0.5) / 5000) for index in range(5000)], minlength=50
    )
    assert ((counts - expected) ** 2 / expected).sum() < 10
    assert np.abs(counts - expected).max() <= 1


def test_random_numbers_are_uniform():
    """The numbers of a thousand seeds and positions fill sixteen bins evenly: chi-square within its 99.9 %."""
    numbers = [sampler.uniform(seed, 0, position) for seed in range(40) for position in range(40)]
    counts = np.bincount((np.array(numbers) * 16).astype(int), minlength=16)
    assert ((counts - 100) ** 2 / 100).sum() < 37.7
    assert min(numbers) >= 0
    assert max(numbers) < 1


def test_random_numbers_depend_on_their_arguments_alone():
    """The same arguments give the same number in any order; every argument matters, and so does every seed."""
    arguments = [(seed, stream, at) for seed in (0, 1, -1, 2**63 - 1, -(2**63)) for stream in (0, 1) for at in (0, 1)]
    forward = [sampler.uniform(*each) for each in arguments]
    backward = [sampler.uniform(*each) for each in reversed(arguments)]
    assert forward == backward[::-1]
    assert len(set(forward)) == len(arguments)


@pytest.mark.parametrize(
    ("params", "expected"),
    [
        ({"presence_penalty": 1.5}, [0.5, -2.5, 1, -1]),
        ({"frequency_penalty": 0.5}, [1.5, -2.5, 1, -1]),
        ({"presence_penalty": -1, "frequency_penalty": 1}, [2, -3, 1, -1]),
        ({"repetition_penalty": 2.0}, [1, -2, 0.5, -1]),
        ({"logit_bias": {3: 100, 0: -2}}, [0, -1, 1, 99]),
        ({"repetition_penalty": 2.0, "presence_penalty": 1, "logit_bias": {0: 1}}, [1, -3, 0.5, -1]),
    ],
)
def test_penalties_by_hand(params, expected):
    """Token 0 was generated once, token 1 three times, token 2 is in the prompt; only repetition looks at that."""
    logits = array(2, -1, 1, -1)
    processed = sampler.process(logits, SamplingParams(**params), (2,), {0: 1, 1: 3}, ())
    assert processed.tolist() == expected
    assert logits.tolist() == [2, -1, 1, -1]


@pytest.mark.parametrize("filters", [{}, {"top_p": 0.9}, {"top_k": 3, "min_p": 0.1}, {"temperature": 1e-4}])
def test_least_repetition_penalty(filters):
    """The smallest number above 0 makes a repeated token certain and overflows nothing."""
    params = SamplingParams(repetition_penalty=1e-45, **filters)
    processed = sampler.process(array(1, 30, 30, 2), params, (3,), {}, ())
    assert {sampler.choose(processed, params, u) for u in SIXTEENTHS} == {3}


def test_banned_tokens_cannot_be():
    """Not even by bias."""
    processed = sampler.process(LOGITS, SamplingParams(logit_bias={1: 100}), (), {}, (1, 3))
    assert np.isneginf(processed).tolist() == [False, True, False, True]


def test_without_penalties_nothing_is_copied():
    """The usual case costs nothing."""
    assert sampler.process(LOGITS, SamplingParams(), (1,), {1: 1}, ()) is LOGITS


@pytest.mark.parametrize(
    ("token", "count", "expected"), [(1, 0, [1]), (2, 2, [1, 0, 2]), (0, 2, [1, 0]), (3, 5, [1, 0, 2, 3])]
)
def test_score_holds_the_chosen_token(token, count, expected):
    """The likeliest tokens and the chosen one, by falling log probability, with the very same float."""
    score = sampler.score(LOGITS, token, count)
    assert [index for index, _ in score.top] == expected
    assert dict(score.top)[token] == score.logprob
    assert score.logprob == pytest.approx(math.log([1 / 4, 1 / 2, 1 / 8, 1 / 8][token]), abs=1e-6)


def test_scores_of_large_logits():
    """Neither overflow nor underflow: two equal giants share the probability."""
    assert sampler.score(array(3e4, 3e4, -3e4), 0, 0).logprob == pytest.approx(-math.log(2))

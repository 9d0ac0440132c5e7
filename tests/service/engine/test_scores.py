"""Kept scores: the same numbers as computed ones, and which tokens they are there for."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.sampler import score
from service.engine.scores import Wanted, covers, most_bytes, pack, unpack

LOGITS = st.lists(st.floats(-60, 60, width=32), min_size=2, max_size=40)


@given(LOGITS, st.data())
def test_a_kept_score_is_the_computed_one(logits, data):
    """To the bit, with as many likeliest tokens as were kept or fewer, whether the token is among them or not."""
    row = np.array(logits, np.float32)
    token = data.draw(st.integers(0, len(logits) - 1))
    kept = data.draw(st.integers(0, len(logits)))
    wanted = data.draw(st.integers(0, kept))
    packed = pack(score(row, token, kept, [0, 1]), kept)
    assert len(packed) + 33 + 8 <= most_bytes(kept)  # a bytes object beside its data, and its place in a list
    assert unpack(packed, token, wanted) == score(row, token, wanted)


def test_a_token_that_cannot_come_is_kept():
    """Minus infinity is a number as well."""
    row = np.array([0, -np.inf, 1], np.float32)
    assert unpack(pack(score(row, 1, 2), 2), 1, 2) == score(row, 1, 2)


# Scores with 0, 1 and 2 likeliest tokens, and none.
KEPT = [pack(score(np.array([3, 2, 1], np.float32), 2, count), count) for count in range(3)]
SCORES = st.lists(st.sampled_from([None, *KEPT]), max_size=8)


def likeliest(packed):
    """How many likeliest tokens a score has; -1 without a score."""
    return -1 if packed is None else KEPT.index(packed)


@given(SCORES, st.integers(1, 9), st.integers(0, 9), st.integers(0, 2), st.booleans())
def test_wanted_scores_end_at_the_first_that_is_not_kept(kept, first, length, count, others):
    """With too few likeliest tokens it does not count, and scores of further tokens are never kept."""
    end = first
    while not others and end < min(length, len(kept)) and likeliest(kept[end]) >= count:
        end += 1
    assert Wanted(first, count, others).scored(kept, length) == end


@given(SCORES, SCORES)
def test_scores_cover_others(mine, others):
    """Each of the others is there, with at least as many likeliest tokens."""
    padded = mine + [None] * len(others)
    assert covers(mine, others) == all(likeliest(a) >= likeliest(b) for a, b in zip(padded, others, strict=False))


def test_more_than_was_kept_is_a_mistake():
    """It is never invented."""
    with pytest.raises(ValueError, match="zip"):
        unpack(pack(score(np.zeros(9, np.float32), 3, 2), 2), 3, 4)

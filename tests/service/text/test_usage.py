"""The token counts of one request."""

from __future__ import annotations

from service.text.usage import TokenCounts
from service.types import Delta


def test_counts_of_two_candidates():
    """Generated tokens add up over candidates; cached tokens count once per prompt, from the first candidate."""
    counts = TokenCounts()
    assert (counts.completion, counts.longest, counts.cached) == (0, 0, 0)
    for candidate, completion_tokens, cached_tokens in [(0, 1, 4), (1, 2, 9), (0, 3, 4)]:
        counts.add(Delta(0, candidate, "", (), None, completion_tokens, cached_tokens))
    assert (counts.completion, counts.longest, counts.cached) == (5, 3, 4)

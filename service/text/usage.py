"""The token counts of one request."""

from __future__ import annotations

from service.types import Delta


class TokenCounts:
    """Counts a request's generated and cached tokens from its deltas."""

    def __init__(self) -> None:
        self._completions: dict[tuple[int, int], int] = {}
        self._cached: dict[int, int] = {}

    def add(self, delta: Delta) -> None:
        """Counts a delta. Tokens that candidates share were computed for this request: they do not count as cached."""
        self._completions[delta.prompt_index, delta.candidate] = delta.completion_tokens
        if delta.candidate == 0:
            self._cached[delta.prompt_index] = delta.cached_tokens

    @property
    def completion(self) -> int:
        """Generated tokens of all candidates."""
        return sum(self._completions.values())

    @property
    def longest(self) -> int:
        """Generated tokens of the longest candidate."""
        return max(self._completions.values(), default=0)

    @property
    def cached(self) -> int:
        """Prompt tokens that were copied from the KV cache and not computed."""
        return sum(self._cached.values())

"""What one key may use: tokens per minute, and sequences at once. Times are seconds of the monotonic clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import OverloadedError, TokensExceededError

_MINUTE = 60.0
# Accounts are looked through for such that say nothing any more when there are so many, or twice as many as were left.
_FEW = 1024

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one key, None for none: tokens of prompts and answers per minute, and sequences running or waiting."""

    tokens_per_minute: int | None = None
    max_sequences: int | None = None

    def over(self, other: Quota) -> Quota:
        """These limits, and `other`'s where these say nothing."""
        return Quota(
            other.tokens_per_minute if self.tokens_per_minute is None else self.tokens_per_minute,
            other.max_sequences if self.max_sequences is None else self.max_sequences,
        )


UNLIMITED = Quota()


@dataclass(slots=True)
class _Account:
    """What a caller uses: `spent` tokens that are not yet forgiven at time `at`, and sequences in the engine."""

    spent: float
    at: float
    sequences: int = 0

    def forgive(self, limit: int, now: float) -> None:
        """The minute passes: as much of what was spent is forgiven as the limit allows for that time."""
        passed = max(0.0, now - self.at)
        self.spent = max(0.0, self.spent - passed * limit / _MINUTE)
        self.at = now


class Meter:
    """Holds callers to their quotas. A request is charged at its beginning with all that it may use.

    Invariants: nothing that is spent or held is ever negative; accounts that hold nothing are dropped in time, so
    there are about as many as callers within a minute.
    """

    def __init__(self, default: Quota, clock: Callable[[], float] = time.monotonic) -> None:
        self._default = default
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._sweep_at = _FEW

    def take(self, identity: str, quota: Quota, tokens: int, sequences: int) -> None:
        """Charges a request.

        Raises TokensExceededError or OverloadedError, and charges nothing, when it is more than the quota leaves.
        """
        limits, now = quota.over(self._default), self._clock()
        account = self._accounts.get(identity) or _Account(0.0, now)
        if limits.max_sequences is not None and account.sequences + sequences > limits.max_sequences:
            raise OverloadedError(
                f"Rate limit reached for sequences at once: Limit {limits.max_sequences}, Used {account.sequences}, "
                f"Requested {sequences}. Please try again when others have ended.",
                retry_after=1.0,
            )
        if limits.tokens_per_minute is not None:
            self._charge(account, limits.tokens_per_minute, tokens, now)
        if limits != UNLIMITED:
            account.sequences += sequences
            self._accounts[identity] = account
            self._sweep(now)

    def give_back(self, identity: str, tokens: int, sequences: int) -> None:
        """Ends a request: so many of its tokens were not used, and its sequences are gone."""
        account = self._accounts.get(identity)
        if account is not None:
            account.spent = max(0.0, account.spent - tokens)
            account.sequences = max(0, account.sequences - sequences)

    def headers(self, identity: str, quota: Quota) -> Headers:
        """What is left to a caller, by OpenAI's names; nothing where there is no limit."""
        limit = quota.over(self._default).tokens_per_minute
        if limit is None:
            return ()
        account = self._accounts.get(identity) or _Account(0.0, self._clock())
        account.forgive(limit, self._clock())
        return (
            ("x-ratelimit-limit-tokens", str(limit)),
            ("x-ratelimit-remaining-tokens", str(max(0, int(limit - account.spent)))),
            ("x-ratelimit-reset-tokens", duration(account.spent * _MINUTE / limit)),
        )

    @staticmethod
    def _charge(account: _Account, limit: int, tokens: int, now: float) -> None:
        account.forgive(limit, now)
        if account.spent + tokens <= limit:
            account.spent += tokens
            return
        numbers = f"Limit {limit}, Used {round(account.spent)}, Requested {tokens}."
        if tokens > limit:
            message = f"Request too large for tokens per minute: {numbers} Ask for less: it can never be served."
            raise TokensExceededError(message, retry_after=_MINUTE)
        wait = (account.spent + tokens - limit) * _MINUTE / limit
        message = f"Rate limit reached for tokens per minute: {numbers} Please try again in {duration(wait)}."
        raise TokensExceededError(message, retry_after=wait)

    def _sweep(self, now: float) -> None:
        if len(self._accounts) < self._sweep_at:
            return
        # After a minute everything is forgiven, whatever the limit.
        self._accounts = {
            name: each for name, each in self._accounts.items() if each.sequences or now - each.at < _MINUTE
        }
        self._sweep_at = max(_FEW, 2 * len(self._accounts))


def duration(seconds: float) -> str:
    """A duration as OpenAI's headers have it: `0s`, `120ms`, `1.5s`, `6m0s`; rounded up to milliseconds."""
    milliseconds = -int(-seconds * 1000 // 1)
    minutes, rest = divmod(milliseconds, 60_000)
    if minutes:
        return f"{minutes}m{rest / 1000:g}s"
    return f"{rest}ms" if 0 < rest < 1000 else f"{rest / 1000:g}s"

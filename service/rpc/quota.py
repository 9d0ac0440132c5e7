"""The limits of a key: requests and tokens per minute, sequences at once. Times are of the monotonic clock."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

from service.errors import OverloadedError, TokensExceededError

_MINUTE = 60.0
# Sweep idle accounts at this many, then each time the count has doubled since the last sweep.
_FIRST_SWEEP = 1024

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Quota:
    """Limits of one key, None for none.

    Requests per minute, tokens of prompts and answers per minute, and sequences running or waiting.
    """

    tokens_per_minute: int | None = None
    max_sequences: int | None = None
    requests_per_minute: int | None = None

    def over(self, other: Quota) -> Quota:
        """These limits, and `other`'s where one of these is None."""
        return Quota(
            other.tokens_per_minute if self.tokens_per_minute is None else self.tokens_per_minute,
            other.max_sequences if self.max_sequences is None else self.max_sequences,
            other.requests_per_minute if self.requests_per_minute is None else self.requests_per_minute,
        )


UNLIMITED = Quota()


@dataclass(slots=True)
class _Bucket:
    """A caller's use of a limit per minute: at time `at`, `spent` still counted against the limit."""

    at: float
    spent: float = 0.0

    def forgive(self, limit: int, now: float) -> None:
        """Reduces `spent` by as much as the limit allows for the time since `at`."""
        passed = max(0.0, now - self.at)
        self.spent = max(0.0, self.spent - passed * limit / _MINUTE)
        self.at = now

    def headers(self, what: str, limit: int) -> Headers:
        """The limit, the rest, and the time until `spent` is 0, under OpenAI's names."""
        return (
            (f"x-ratelimit-limit-{what}", str(limit)),
            (f"x-ratelimit-remaining-{what}", str(max(0, int(limit - self.spent)))),
            (f"x-ratelimit-reset-{what}", duration(self.spent * _MINUTE / limit)),
        )


class _Account:
    """A caller's use of the limits per minute, and its sequences in the engine."""

    def __init__(self, now: float) -> None:
        self.tokens = _Bucket(now)
        self.requests = _Bucket(now)
        self.sequences = 0

    def in_use(self, now: float) -> bool:
        """Whether it differs from a new account. After a minute without use it does not, whatever the limit."""
        return bool(self.sequences) or now - max(self.tokens.at, self.requests.at) < _MINUTE


class Meter:
    """Enforces the callers' quotas. A request is charged at its start for the most that it may use.

    Invariants: no balance is ever negative; idle accounts are dropped in time, so that there are about as many accounts
    as callers within a minute.
    """

    def __init__(self, default: Quota, clock: Callable[[], float] = time.monotonic) -> None:
        self.default = default
        self._clock = clock
        self._accounts: dict[str, _Account] = {}
        self._sweep_at = _FIRST_SWEEP

    def __len__(self) -> int:
        """The number of accounts."""
        return len(self._accounts)

    def sequences(self, key: str) -> int:
        """The number of sequences that a caller has in the engine."""
        account = self._accounts.get(key)
        return 0 if account is None else account.sequences

    def request(self, key: str, quota: Quota) -> None:
        """Counts a request. Raises OverloadedError, and counts nothing, if the limit per minute is reached."""
        limits, now = quota.over(self.default), self._clock()
        limit = limits.requests_per_minute
        if limit is None:
            return
        account = self._account(key, now)
        account.requests.forgive(limit, now)
        if account.requests.spent + 1 > limit:
            wait = (account.requests.spent + 1 - limit) * _MINUTE / limit
            numbers = f"Limit {limit}, Used {math.ceil(account.requests.spent)}."
            message = f"Rate limit reached for requests per minute: {numbers} Please try again in {duration(wait)}."
            raise OverloadedError(message, retry_after=wait)
        account.requests.spent += 1
        self._keep(key, account, now)

    def take(self, key: str, quota: Quota, tokens: int, sequences: int) -> None:
        """Charges a request.

        Raises TokensExceededError or OverloadedError, and charges nothing, if the rest of the quota is too small.
        """
        limits, now = quota.over(self.default), self._clock()
        account = self._account(key, now)
        if limits.max_sequences is not None and account.sequences + sequences > limits.max_sequences:
            raise OverloadedError(
                f"Rate limit reached for sequences at once: Limit {limits.max_sequences}, Used {account.sequences}, "
                f"Requested {sequences}. Please try again when others have ended.",
                retry_after=1.0,
            )
        if limits.tokens_per_minute is not None:
            self._charge(account.tokens, limits.tokens_per_minute, tokens, now)
        if limits != UNLIMITED:
            account.sequences += sequences
            self._keep(key, account, now)

    def give_back(self, key: str, tokens: int, sequences: int) -> None:
        """Ends a request: refunds its unused `tokens` and releases its `sequences`."""
        account = self._accounts.get(key)
        if account is not None:
            account.tokens.spent = max(0.0, account.tokens.spent - tokens)
            account.sequences = max(0, account.sequences - sequences)

    def headers(self, key: str, quota: Quota) -> Headers:
        """A caller's remaining quota, by OpenAI's names; empty if there is no limit."""
        limits, now = quota.over(self.default), self._clock()
        account = self._account(key, now)
        headers: Headers = ()
        if limits.requests_per_minute is not None:
            account.requests.forgive(limits.requests_per_minute, now)
            headers += account.requests.headers("requests", limits.requests_per_minute)
        if limits.tokens_per_minute is not None:
            account.tokens.forgive(limits.tokens_per_minute, now)
            headers += account.tokens.headers("tokens", limits.tokens_per_minute)
        return headers

    @staticmethod
    def _charge(bucket: _Bucket, limit: int, tokens: int, now: float) -> None:
        bucket.forgive(limit, now)
        if bucket.spent + tokens <= limit:
            bucket.spent += tokens
            return
        numbers = f"Limit {limit}, Used {round(bucket.spent)}, Requested {tokens}."
        if tokens > limit:
            message = f"Request too large for tokens per minute: {numbers} Ask for less: it can never be served."
            raise TokensExceededError(message, retry_after=_MINUTE)
        wait = (bucket.spent + tokens - limit) * _MINUTE / limit
        message = f"Rate limit reached for tokens per minute: {numbers} Please try again in {duration(wait)}."
        raise TokensExceededError(message, retry_after=wait)

    def _account(self, key: str, now: float) -> _Account:
        """A caller's account; a new one is not stored yet."""
        return self._accounts.get(key) or _Account(now)

    def _keep(self, key: str, account: _Account, now: float) -> None:
        self._accounts[key] = account
        if len(self._accounts) >= self._sweep_at:
            self._accounts = {name: account for name, account in self._accounts.items() if account.in_use(now)}
            self._sweep_at = max(_FIRST_SWEEP, 2 * len(self._accounts))


def duration(seconds: float) -> str:
    """A duration in the format of OpenAI's headers, rounded up to milliseconds: `0s`, `120ms`, `1.5s`, `6m0s`."""
    milliseconds = -int(-seconds * 1000 // 1)
    minutes, rest = divmod(milliseconds, 60_000)
    if minutes:
        return f"{minutes}m{rest / 1000:g}s"
    return f"{rest}ms" if 0 < rest < 1000 else f"{rest / 1000:g}s"

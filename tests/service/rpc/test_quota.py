"""Quotas of tokens per minute and sequences at once, by a clock that the tests move."""

from __future__ import annotations

import random

import pytest

from service.errors import OverloadedError, TokensExceededError
from service.rpc.quota import UNLIMITED, Meter, Quota, duration


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock():
    return Clock()


def left(meter, name="me", quota=UNLIMITED):
    return {key.removeprefix("x-ratelimit-"): value for key, value in meter.headers(name, quota)}


def test_without_limits_there_is_no_account(clock):
    """Nothing is counted, and no header sent."""
    meter = Meter(UNLIMITED, clock)
    meter.take("me", UNLIMITED, 10**9, 128)
    assert meter.headers("me", UNLIMITED) == ()
    assert len(meter) == 0


def test_tokens_come_back_evenly(clock):
    """Of 600 a minute, 10 a second; never more than the limit."""
    meter = Meter(Quota(600), clock)
    meter.take("me", UNLIMITED, 500, 1)
    assert left(meter) == {"limit-tokens": "600", "remaining-tokens": "100", "reset-tokens": "50s"}
    clock.now += 20
    assert left(meter) == {"limit-tokens": "600", "remaining-tokens": "300", "reset-tokens": "30s"}
    clock.now += 1000
    assert left(meter) == {"limit-tokens": "600", "remaining-tokens": "600", "reset-tokens": "0s"}


def test_refused_until_enough_came_back(clock):
    """A caller above its quota is told how long to wait, is charged nothing, and is served after that."""
    meter = Meter(Quota(600), clock)
    meter.take("me", UNLIMITED, 500, 1)
    with pytest.raises(TokensExceededError, match=r"Limit 600, Used 500, Requested 130.*in 3s") as caught:
        meter.take("me", UNLIMITED, 130, 1)
    assert caught.value.retry_after == pytest.approx(3.0)
    meter.take("another", UNLIMITED, 130, 1)
    clock.now += 3.0
    meter.take("me", UNLIMITED, 130, 1)
    with pytest.raises(TokensExceededError, match="too large"):
        meter.take("me", UNLIMITED, 601, 1)


def test_unused_tokens_are_given_back(clock):
    """Unused tokens are available at once."""
    meter = Meter(Quota(600, 2), clock)
    meter.take("me", UNLIMITED, 500, 1)
    meter.give_back("me", 450, 1)
    assert left(meter)["remaining-tokens"] == "550"


def test_sequences_at_once(clock):
    """Running and waiting sequences count together; an ended one makes room for its own caller only."""
    meter = Meter(Quota(None, 3), clock)
    meter.take("me", UNLIMITED, 1, 2)
    with pytest.raises(OverloadedError, match="Limit 3, Used 2, Requested 2"):
        meter.take("me", UNLIMITED, 1, 2)
    meter.take("another", UNLIMITED, 1, 3)
    meter.take("me", UNLIMITED, 1, 1)
    meter.give_back("me", 0, 2)
    meter.take("me", UNLIMITED, 1, 2)


def test_a_keys_own_limits_come_first(clock):
    """Whether they are higher or lower than the default."""
    meter = Meter(Quota(600, 2), clock)
    meter.take("me", Quota(6000, None), 5000, 2)
    assert left(meter, quota=Quota(6000))["remaining-tokens"] == "1000"
    with pytest.raises(OverloadedError):
        meter.take("me", Quota(6000, None), 1, 1)
    meter.take("you", Quota(None, 5), 1, 5)


def test_a_clock_that_goes_back_takes_nothing(clock):
    """Not that a monotonic one would."""
    meter = Meter(Quota(600), clock)
    meter.take("me", UNLIMITED, 300, 1)
    clock.now -= 3600
    assert left(meter)["remaining-tokens"] == "300"
    clock.now += 30
    assert left(meter)["remaining-tokens"] == "600"


def test_nothing_is_ever_negative(clock):
    """For any charges and refunds at any times."""
    draw = random.Random(3)
    meter, held = Meter(Quota(1000, 8), clock), []
    for _ in range(3000):
        clock.now += draw.choice([0, 0.01, 1, 30, -5])
        tokens, sequences = draw.randrange(500), draw.randrange(1, 5)
        try:
            meter.take("me", UNLIMITED, tokens, sequences)
            held.append((tokens, sequences))
        except OverloadedError:
            pass
        if held and draw.random() < 0.5:
            tokens, sequences = held.pop(draw.randrange(len(held)))
            meter.give_back("me", draw.randrange(tokens + 1), sequences)
        assert meter.sequences("me") == sum(count for _, count in held) <= 8
        assert 0 <= int(left(meter)["remaining-tokens"]) <= 1000  # so what is spent is never negative


def test_accounts_do_not_pile_up(clock):
    """Ten thousand keys, one after the other, leave about as many accounts as came within a minute."""
    meter = Meter(Quota(600), clock)
    for index in range(10_000):
        clock.now += 0.1
        meter.take(f"key {index}", UNLIMITED, 10, 1)
        meter.give_back(f"key {index}", 0, 1)
    assert len(meter) <= 2048


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.0001, "1ms"), (0.12, "120ms"), (1, "1s"), (1.5, "1.5s"), (59.9994, "1m0s"), (360, "6m0s")],
)
def test_durations(seconds, text):
    """As OpenAI writes them, rounded up."""
    assert duration(seconds) == text


def test_requests_per_minute(clock):
    """A bucket of `limit` requests, refilled evenly; any number of other callers gives no caller a new bucket."""
    meter = Meter(Quota(requests_per_minute=3), clock)
    for _ in range(3):
        meter.request("me", UNLIMITED)
    for number in range(5000):
        meter.request(f"junk-{number}", UNLIMITED)
    with pytest.raises(OverloadedError, match="Limit 3, Used 3") as caught:
        meter.request("me", UNLIMITED)
    assert caught.value.retry_after == pytest.approx(20)
    assert dict(meter.headers("me", UNLIMITED))["x-ratelimit-remaining-requests"] == "0"
    clock.now += 20
    meter.request("me", UNLIMITED)
    with pytest.raises(OverloadedError):
        meter.request("me", UNLIMITED)
    meter.request("me", Quota(requests_per_minute=10))

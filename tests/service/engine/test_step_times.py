"""How long calls take is learnt from calls: by a line that a reader can compute."""

from __future__ import annotations

import math

import pytest

from service.engine.step import HALF_SPEED, work
from service.engine.step_times import StepTimes


def learnt(fixed=0.5, each=0.1, rows=1, chunk=128):
    """Calls take `fixed` seconds, and `each` for a token."""
    times = StepTimes()
    for _ in range(20):
        times.decode(rows, fixed + each * rows)
        times.prefill(chunk, fixed + each * chunk)
    return times


def test_work_is_counted_in_tokens_at_the_start():
    """After 1280 positions a token counts twice."""
    assert work(0, 10) == 10
    assert work(HALF_SPEED, 10) == 20


def test_nothing_is_known_at_first():
    """Then nothing is expected, and no chunk is too long."""
    assert StepTimes().expected(100) == 0
    assert StepTimes().longest_chunk(0, 0.5) > 10**6


def test_a_decode_step_says_something_of_a_chunk():
    """Before the first chunk, each of its tokens is expected to take as long as a step."""
    times = StepTimes()
    times.decode(1, 0.6)
    assert times.expected(100) == pytest.approx(60)


def test_the_line():
    """Fixed seconds, and seconds for each token, follow from decode steps and chunks."""
    assert learnt().expected(50) == pytest.approx(5.5)


def test_no_line_through_points_that_are_close():
    """After prompts as short as a decode step, a token of a longer one is expected to take its part of such a call."""
    times = StepTimes()
    times.decode(4, 0.78)
    times.prefill(5, 0.80)
    assert times.expected(100) == pytest.approx(16)


@pytest.mark.parametrize(("start", "seconds", "tokens"), [(0, 2.5, 20), (HALF_SPEED, 2.5, 10), (0, 0.4, 0)])
def test_the_longest_chunk(start, seconds, tokens):
    """As many tokens as take that long; after 1280 positions half as many; none if no call is that short."""
    assert learnt().longest_chunk(start, seconds) == pytest.approx(tokens, abs=1)
    assert learnt().longest_chunk(start, math.inf) > 10**6


def test_a_slower_machine_is_noticed_within_a_few_calls():
    """After calls of twice the time, the longest chunk halves."""
    times = learnt(fixed=0.0)
    assert times.longest_chunk(0, 2.0) == 20
    for _ in range(8):
        times.decode(1, 0.2)
        times.prefill(20, 4.0)
    assert times.longest_chunk(0, 2.0) < 15

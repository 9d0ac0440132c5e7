"""Admission: how long a request would wait, and who may queue. Every number can be worked out by hand."""

from __future__ import annotations

import random

import pytest

from service.engine.admission import Admission, Pace, Space, Work, queue_seconds, work_ahead
from service.errors import DeadlineError, OverloadedError


def pace(*, share: float = 1.0) -> Pace:
    """A prompt token takes 0.01 s, a step of 4 sequences 0.2 s: 0.05 s a token."""
    made = Pace()
    made.chunk(100, 1.0)
    made.step(4, 0.2)
    made.ended(round(100 * share), 100)
    return made


def test_nothing_is_known_at_first():
    """Before the first step no wait is estimated, and all of max_tokens is expected to be used."""
    made = Pace()
    assert made.total(Work(5, 1000, 1000)) == 0
    made.step(1, 0.1)
    assert made.generation(10) == pytest.approx(1.0)


def test_pace_is_learnt_from_steps():
    """The pace is seconds per prompt token, per decode step, and per token of a batch."""
    assert pace().prompts(50) == pytest.approx(0.5)
    assert pace().generation(100) == pytest.approx(5.0)
    assert pace().steps(100) == pytest.approx(20.0)
    assert pace(share=0.5).generation(100) == pytest.approx(2.5)
    assert pace().total(Work(1, 50, 100)) == pytest.approx(5.5)


def test_old_steps_are_forgotten():
    """After the machine has become twice as slow, the estimate follows within 34 steps to three quarters of the way."""
    made = Pace()
    for _ in range(500):
        made.step(1, 1.0)
    for _ in range(34):
        made.step(1, 2.0)
    assert made.steps(1) == pytest.approx(1.5, abs=0.02)


PLENTY = 10**6


def space(slots: int, *ends: int, positions: int = PLENTY) -> Space:
    """Free slots and positions, and sequences of 100 positions that end within these decode steps."""
    return Space(slots, positions, tuple((steps, 100) for steps in ends))


@pytest.mark.parametrize(
    ("ahead", "free", "seconds"),
    [
        (Work(), space(4), 0.0),
        # A slot is free: only the prefills ahead count.
        (Work(3, 300, 900), space(4), 3.0),
        # The same beside a stream: a decode step follows each of the 3 chunks of 100 tokens.
        (Work(3, 300, 900), space(4, 10), 3.0 + 0.6),
        # No slot, no queue: until the next sequence ends, 10 steps of 0.2 s.
        (Work(), space(0, 30, 10), 2.0),
        # No slot, 3 ahead: the same, their prompts, and their 60 tokens at 0.05 s.
        (Work(3, 300, 60), space(0, 10), 2.0 + 3.6 + 3.0),
        # Of 4 ahead, 1 finds a slot: the prompts, and three quarters of 80 tokens.
        (Work(4, 100, 80), space(1, 5), 1.2 + 3.0),
        # A slot is free, and no memory: two sequences of 100 positions have to end for 150.
        (Work(), space(4, 30, 10, 20, positions=0), 4.0),
        # Memory for half of what is ahead and what is asked for: half of 80 tokens come first.
        (Work(1, 0, 80, 150), space(4, positions=150), 2.0),
    ],
)
def test_estimated_wait(ahead, free, seconds):
    """By hand: prompts at 0.01 s a token, a step 0.2 s, a generated token 0.05 s; the request takes 150 positions."""
    assert queue_seconds(ahead, 150, free, pace()) == pytest.approx(seconds)


def test_others_count_as_much_as_oneself():
    """Of another's queue only as much is ahead as one has queued oneself: the scheduler serves the least served."""
    flood = Work(10, 0, 2000)  # 100 s
    assert work_ahead(Work(), [flood], pace()) == Work()
    mine = Work(1, 0, 200)  # 10 s
    assert work_ahead(mine, [flood], pace()) == Work(2, 0, 400)
    assert work_ahead(flood, [mine], pace()) == Work(11, 0, 2200)
    assert work_ahead(mine, [flood, flood, mine], pace()) == Work(4, 0, 800)


def admission(max_sequences: int = 1000, max_seconds: float = 10.0) -> Admission:
    made = Admission(max_sequences, max_seconds)
    made.pace = pace()
    return made


def test_refused_by_estimated_wait():
    """Requests of 2 s each are taken until over 10 s wait; who is refused hears how long the wait is."""
    queue = admission()
    for _ in range(5):  # with the 1 s until the next slot the waits are 1, 3, 5, 7 and 9 s
        queue.check("me", space(0, 5), None)
        queue.enter("me", [Work(1, 0, 40)])
    with pytest.raises(OverloadedError) as caught:
        queue.check("me", space(0, 5), None)
    assert caught.value.retry_after == pytest.approx(11.0)


def test_a_full_queue_of_one_is_open_to_others():
    """Only the flooding caller is refused."""
    queue = admission()
    queue.enter("flood", [Work(1, 0, 10**6)])
    with pytest.raises(OverloadedError):
        queue.check("flood", space(0), None)
    queue.check("other", space(0), None)


def test_one_caller_alone_fills_half_of_the_queue():
    """By number too: what one caller queues is never more than what is left to others."""
    queue = admission(max_sequences=8, max_seconds=1e9)
    for _ in range(4):
        queue.check("flood", space(0), None)
        queue.enter("flood", [Work(1, 0, 1)])
    with pytest.raises(OverloadedError) as caught:
        queue.check("flood", space(0), None)
    assert caught.value.retry_after >= 1
    for _ in range(2):
        queue.check("other", space(0), None)
        queue.enter("other", [Work(1, 0, 1)])
    with pytest.raises(OverloadedError):
        queue.check("other", space(0), None)
    queue.check("third", space(0), None)


def test_deadline_shorter_than_the_wait():
    """Refused at once; a deadline as long as the wait is not."""
    queue = admission()
    with pytest.raises(DeadlineError):
        queue.check("me", space(0, 10), 1.9)
    queue.check("me", space(0, 10), 2.1)
    queue.check("me", space(1, 10), 0.01)


def test_queue_holds_what_waits_and_no_more():
    """In any order of starts and ends, the queued work is the sum of the waiting requests, and zero at the end."""
    draw = random.Random(7)
    queue, tickets = admission(), []
    for _ in range(2000):
        if draw.random() < 0.3:
            name = draw.choice("abc")
            tickets.append(queue.enter(name, [Work(1, draw.randrange(9), draw.randrange(9)) for _ in range(3)]))
        elif tickets and draw.random() < 0.8:
            queue.started(draw.choice(tickets))
        elif tickets:
            queue.leave(tickets.pop(draw.randrange(len(tickets))))
        for name in "abc":
            waiting = [work for ticket in tickets if ticket.identity == name for work in ticket.waiting]
            assert queue.queued.get(name, Work()) == sum(waiting, Work())
    for ticket in tickets:
        queue.leave(ticket)
    assert queue.queued == {}


def test_only_what_is_as_urgent_is_before_a_request():
    """Of the caller's own work; another caller's counts as it always does."""
    made = admission(max_seconds=100.0)
    made.enter("me", [Work(1, 0, 100, 1)] * 4, priority=10)
    busy = space(0, 5)
    assert (
        made.wait("me", busy, priority=-1)
        == made.wait("new", space(0, 5), priority=-1)
        < made.wait("me", busy, priority=10)
    )
    ticket = made.enter("me", [Work(1, 0, 100, 1)], priority=-1)
    assert made.queued["me"].sequences == 5
    made.leave(ticket)
    assert made.queued["me"].sequences == 4

"""The memory that models share: what fits, who waits, and who is woken."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.budget import Budget, Share


def shares(total, *sizes):
    """Shares of models whose positions have these sizes; each notes its calls in `calls`."""
    budget = Budget(total)
    made = [Share(budget, size) for size in sizes]
    calls = []
    for number, share in enumerate(made):
        share.wake = lambda number=number: calls.append(f"wake {number}")
        share.evict = lambda number=number: calls.append(f"evict {number}")
    return (*made, calls)


def test_positions_by_hand():
    """A budget of 1000 bytes holds 240 positions of 4 bytes by 16; what is held is not free."""
    share = Share(Budget(1000), 4, 16)
    assert (share.positions, share.free, share.rounded(1), share.rounded(33)) == (240, 240, 16, 48)
    assert share.take(33) == 0
    assert share.free == 192
    share.settle(0, 48)
    assert share.free == 240


def test_kept_prefixes_are_given_up_for_a_sequence():
    """First those of the model itself: it hears how many positions; nothing is evicted before a sequence fits."""
    (share, calls) = shares(100, 1)
    assert share.take(60) == 0
    share.settle(60, 40)
    assert share.take(30) == 30
    share.settle(90, 10)
    assert share.take(20) is None
    assert calls == []


def test_another_models_prefixes_are_given_up():
    """The other model is asked for them, in its own positions, and the first is woken when they are gone."""
    one, other, calls = shares(100, 1, 3)
    assert other.take(20) == 0
    other.settle(0, 20)
    assert one.take(50) is None
    assert calls == ["evict 1"]
    assert other.wanted() == 4
    other.settle(0, 16)
    assert other.wanted() == 0
    assert calls[1:] == ["wake 0"]
    assert one.take(50) == 0


def test_nothing_is_evicted_for_what_does_not_fit_yet():
    """While running sequences hold too much, prefixes of others are kept."""
    one, other, calls = shares(100, 1, 1)
    assert other.take(80) == 0
    other.settle(60, 20)
    assert one.take(50) is None
    assert calls == []


def test_the_oldest_goes_first():
    """What would fit waits behind an older sequence that does not, of another model too."""
    one, other, calls = shares(100, 1, 1)
    assert one.take(60) == 0
    assert other.take(50) is None
    assert one.take(10) is None
    one.settle(0, 0)
    assert calls == ["wake 1"]
    assert one.take(10) is None
    assert other.take(50) == 0
    assert calls == ["wake 1", "wake 0"]
    assert one.take(10) == 0


def test_who_gives_up_its_place_lets_the_next_go():
    """A sequence whose caller leaves waits no longer."""
    one, other, calls = shares(100, 1, 1)
    assert one.take(60) == 0
    assert other.take(50) is None
    assert one.take(10) is None
    other.stop_waiting()
    assert calls == ["wake 0"]
    assert one.take(10) == 0


@given(st.integers(0, 10**9), st.sampled_from([64, 100, 333]))
def test_never_more_than_there_is(seed, total):
    """For any two models that take, keep and free memory, it is never exceeded, and whoever waits gets it."""
    draw = random.Random(seed)
    budget = Budget(total)
    models = [Share(budget, 1, 8), Share(budget, 3, 1)]
    held, kept, wanted = [[], []], [0, 0], [None, None]

    def evict(number):
        kept[number] = max(0, kept[number] - models[number].rounded(models[number].wanted()))
        models[number].settle(sum(held[number]), kept[number])

    for share in models:
        asked = []
        share.evict = lambda asked=asked: asked.append(True)
        share.asked = asked
    for _ in range(200):
        number = draw.randrange(2)
        share = models[number]
        while share.asked:
            share.asked.pop()
            evict(number)
        if held[number] and draw.random() < 0.4:
            ended = held[number].pop(draw.randrange(len(held[number])))
            kept[number] += share.rounded(draw.randrange(ended + 1)) if draw.random() < 0.7 else 0
            kept[number] = min(kept[number], ended)
        else:
            wanted[number] = wanted[number] or draw.randrange(1, share.positions // 2)
            missing = share.take(wanted[number])
            if missing is not None:
                kept[number] -= share.rounded(missing)
                held[number].append(share.rounded(wanted[number]))
                wanted[number] = None
        kept[number] = max(0, kept[number])
        share.settle(sum(held[number]), kept[number])
        assert sum(each.held_bytes + each.kept_bytes for each in models) <= total
    for number in (0, 1):
        held[number].clear()
        models[number].settle(0, 0)
        kept[number] = 0
    while any(wanted):
        first = models.index(budget.waiting[0])
        assert models[first].take(wanted[first]) == 0
        wanted[first] = None
        models[first].settle(0, 0)


def test_a_sequence_of_all_positions_fits():
    """Whatever the sizes, as many positions as the budget has can be held by one sequence."""
    for total, size, granule in ((1000, 7, 16), (64, 1, 8), (10**9, 46_080, 16)):
        share = Share(Budget(total), size, granule)
        assert share.take(share.positions) == 0
        with pytest.raises(AssertionError):
            assert share.take(1) == 0

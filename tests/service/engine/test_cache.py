"""KVCache: who holds which slot, and what prompts' slots still hold."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.engine.budget import Budget, Share
from service.engine.cache import Copy, KVCache, common_prefix
from service.engine.scores import Wanted

LONG = tuple(range(20))


class Slots:
    """Slots whose positions hold (identity, token), so that copies can be checked by looking."""

    def __init__(self, count):
        self.held = []
        self.contents = [[] for _ in range(count)]

    def apply(self, copies):
        for copy in copies:
            assert copy.length <= len(self.contents[copy.source])
            self.contents[copy.target] = self.contents[copy.source][: copy.length]
            if copy.moves:
                self.contents[copy.source] = []

    def check(self):
        for slot, expected in enumerate(self.held):
            assert self.contents[slot][: len(expected)] == expected


def allocate(cache, slots, prompt, identity, recompute=1):
    """Allocates and computes the whole prompt; gives how much of it was cached."""
    allocation = cache.allocate(prompt, identity, recompute)
    slots.apply(allocation.copies)
    assert allocation.slot == len(slots.held)
    assert allocation.cached <= max(0, len(prompt) - recompute)
    positions = [(identity, token) for token in prompt]
    assert slots.contents[allocation.slot][: allocation.cached] == positions[: allocation.cached]
    slots.contents[allocation.slot][allocation.cached :] = positions[allocation.cached :]
    slots.held.append(positions)
    cache.record(allocation.slot, len(prompt))
    slots.check()
    return allocation.cached


def release(cache, slots, slot):
    """Releases a slot and moves the last holder into the hole."""
    slots.apply(cache.release(slot, len(slots.held[-1])))
    last = slots.held.pop()
    if slot < len(slots.held):
        slots.held[slot] = last
    assert cache.held == len(slots.held)
    slots.check()


@given(st.integers(0, 10**9), st.integers(1, 5))
def test_every_holder_keeps_its_positions(seed, count):
    """For any allocations and releases, held slots stay consecutive, and copies never mix up their contents."""
    draw = random.Random(seed)
    cache, slots = KVCache(count), Slots(count)
    for _ in range(60):
        if cache.free and draw.random() < 0.5:
            prompt = LONG[: draw.randrange(21)] + tuple(draw.randrange(3) for _ in range(draw.randrange(1, 20)))
            allocate(cache, slots, prompt, draw.choice("xy"), draw.choice([0, 1, 2, len(prompt)]))
        elif slots.held:
            slot = draw.randrange(len(slots.held))
            slots.held[slot].append(("generated", draw.random()))
            slots.contents[slot][len(slots.held[slot]) - 1 :] = [slots.held[slot][-1]]
            if draw.random() < 0.7:
                release(cache, slots, slot)
        assert cache.free == count - len(slots.held)


def test_prompt_of_an_ended_sequence_is_used_again():
    """All but the last token, which must be computed to get its logits."""
    cache, slots = KVCache(2), Slots(2)
    allocate(cache, slots, LONG, "x")
    release(cache, slots, 0)
    assert allocate(cache, slots, LONG, "x") == len(LONG) - 1


def test_prompt_of_a_running_sequence_is_used():
    """A slot need not be free to be copied from."""
    cache, slots = KVCache(2), Slots(2)
    allocate(cache, slots, LONG, "x")
    assert allocate(cache, slots, (*LONG[:15], 99), "x") == 15


def test_identities_never_share():
    """The same prompt of another caller is computed anew."""
    cache, slots = KVCache(2), Slots(2)
    allocate(cache, slots, LONG, "x")
    assert allocate(cache, slots, LONG, "y") == 0


def test_generated_positions_are_never_reused():
    """A prompt that continues another's completion reuses only that one's prompt."""
    cache, slots = KVCache(2), Slots(2)
    allocate(cache, slots, LONG, "x")
    slots.held[0].append(("x", 77))
    slots.contents[0].append(("x", 77))
    assert allocate(cache, slots, (*LONG, 77, 78), "x") == len(LONG)


class Exact:
    """An exact cache with one caller after the other: each computes its prompt, generates tokens, and leaves.

    A token's score with k likeliest tokens is made of k; that of the wrong token shows.
    """

    def __init__(self, slots=3, positions=1000):
        self.cache = KVCache(slots, Share(Budget(positions)), exact=True)

    def begin(self, prompt, identity="x", generated=(), likeliest=None, wanted=None):
        """Gives the allocation of a sequence that runs."""
        tokens = list(prompt)
        made = self.cache.allocate(tokens, identity, 2, len(prompt) + len(generated) + 1, wanted)
        tokens += [*generated, 99]  # the last has no position
        if likeliest is not None:
            made.scores[:] = [self.score(token, likeliest) for token in tokens]
        self.cache.record(made.slot, len(tokens) - 1)
        return made

    def serve(self, *arguments, **changes):
        """Gives how many positions were reused, and their scores."""
        made = self.begin(*arguments, **changes)
        found = made.cached, made.scores.copy() if "likeliest" not in changes else []
        self.cache.release(made.slot, 0)
        return found

    @staticmethod
    def score(token, likeliest):
        return bytes([token] * 4 + [0] * 8 * likeliest)


def test_exact_positions_are_reused_though_generated():
    """All that were computed: the last token that was chosen has no position."""
    slots = Exact()
    slots.serve(LONG, generated=(77, 78))
    assert slots.serve((*LONG, 77, 78, 99, 5, 6))[0] == len(LONG) + 2
    assert slots.serve((*LONG, 77, 80, 81, 82))[0] == len(LONG) + 1
    assert slots.serve((*LONG, 77, 78, 99), "y")[0] == 0


def test_exact_positions_are_reused_while_they_are_generated():
    """A slot need not be free."""
    slots = Exact()
    slots.begin(LONG, generated=(77,))
    assert slots.begin((*LONG, 77, 99, 6)).cached == len(LONG) + 1


@pytest.mark.parametrize(("more", "again"), [(range(50, 67), 37), (range(50, 60), 20)])
def test_what_follows_a_prefix_stays_if_it_is_long(more, again):
    """Two conversations begin alike: the second takes the slot of the first, whose rest moves if it is worth that."""
    slots = Exact()
    slots.serve(LONG, generated=more)
    assert slots.serve((*LONG, 70, 71, 72))[0] == len(LONG)
    assert slots.serve((*LONG, *more, 80, 81))[0] == again


def test_what_follows_a_prefix_goes_where_memory_is_short():
    """The prefix itself is reused, as it is a part of what the sequence takes."""
    slots = Exact(positions=60)
    slots.serve(LONG, generated=range(50, 67))
    assert slots.serve((*LONG, 70, 71, 72))[0] == len(LONG)
    assert slots.cache.share.kept_bytes <= 60
    assert slots.serve((*LONG, *range(50, 67), 80, 81))[0] == len(LONG)


def test_memory_of_generated_positions_is_needed():
    """They go with their prompt, the least recently used first."""
    slots = Exact(slots=4, positions=80)
    for first in (1, 2, 3):
        slots.serve((first, *LONG), generated=range(50, 60))
    assert slots.cache.share.kept_bytes == 2 * 31
    assert [slots.serve((first, *LONG, *range(50, 60), 0, 0))[0] for first in (1, 3, 2)] == [0, 31, 0]


def test_kept_scores_serve_a_prompt_that_wants_them():
    """One token is computed again where the prompts part, because the score of the next one follows it."""
    slots = Exact()
    slots.serve(LONG, generated=(77,), likeliest=2)
    score = slots.score
    wanted = Wanted(1, 2)
    kept = [score(token, 2) for token in (*LONG, 77)]
    assert slots.serve((*LONG, 77, 55, 56, 57), wanted=wanted) == (len(LONG), kept)
    assert slots.serve((*LONG, 77, 60, 61, 62)) == (len(LONG) + 1, kept)
    assert slots.serve((*LONG[:9], 55, 56, 57), wanted=wanted) == (8, kept[:9])
    assert slots.serve(LONG, "y", wanted=wanted) == (0, [])


def test_scores_that_are_not_kept_are_computed():
    """With more likeliest tokens, or of further tokens, or of a token that nobody scored: from the first of them on."""
    slots = Exact()
    slots.begin(LONG, likeliest=1)
    for wanted in (Wanted(1, 2), Wanted(1, 1, others=True)):
        assert KVCache.allocate(slots.cache, list(LONG), "x", 2, wanted=wanted).cached == 0
    slots = Exact()
    slots.begin(LONG, likeliest=1).scores[7] = None
    assert slots.begin(LONG, wanted=Wanted(1, 0)).cached == 6
    assert slots.begin(LONG, wanted=Wanted(7, 0)).cached == 6
    slots = Exact()
    slots.begin(LONG, likeliest=1).scores[7] = None
    assert slots.begin(LONG, wanted=Wanted(8, 0)).cached == len(LONG) - 2


def test_the_prompt_with_more_scores_stays():
    """Of two prompts that are the same, that without scores is no reason to let the other go."""
    for first, second, cached in ((None, 1, 18), (1, None, 18), (None, None, 0)):
        slots = Exact(slots=4)
        running = [slots.begin(LONG, likeliest=likeliest) for likeliest in (first, second)]
        for made in running[::-1]:
            slots.cache.release(made.slot, 0)
        slots.begin((50, 51))
        assert slots.begin(LONG, wanted=Wanted(1, 1)).cached == cached


def test_without_exact_positions_no_scores_are_kept():
    """Then wanted scores are computed, and nothing takes them."""
    cache = KVCache(2)
    for _ in range(2):
        made = cache.allocate(LONG, "x", 2, wanted=Wanted(5, 0))
        cache.record(made.slot, len(LONG))
        assert made.scores is None
    assert made.cached == 4


def test_positions_not_computed_yet_are_not_shared():
    """Of a prompt in chunks only what has been recorded counts."""
    cache = KVCache(2)
    cache.allocate(LONG, "x", 1)
    cache.record(0, 8)
    assert cache.allocate(LONG, "x", 1).cached == 8


def test_kept_prompt_moves_out_of_the_way():
    """A prompt worth keeping moves to a free slot before its own slot is allocated."""
    cache = KVCache(3)
    cache.allocate(LONG, "x", 1)
    cache.record(0, len(LONG))
    cache.release(0, len(LONG))
    assert cache.allocate((50, 51), "x", 1).copies == (Copy(0, 1, len(LONG)), Copy(0, 0, 0))


def test_short_prompts_are_not_worth_moving():
    """Few positions are cheaper to compute than to copy about; their memory is given back."""
    cache = KVCache(3)
    cache.allocate((1, 2, 3), "x", 1)
    cache.record(0, 3)
    cache.release(0, 3)
    assert cache.allocate((50, 51), "x", 1).copies == (Copy(0, 0, 0),)


def test_least_recently_used_prompt_goes_first():
    """With room for one kept prompt, the later used stays."""
    cache, slots = KVCache(3), Slots(3)
    first, second = (*LONG, 1), (*reversed(LONG), 2)
    allocate(cache, slots, first, "x")
    allocate(cache, slots, second, "x")
    release(cache, slots, 1)
    release(cache, slots, 0)
    allocate(cache, slots, second, "x")
    allocate(cache, slots, (70, 71), "x")
    allocate(cache, slots, (72, 73), "x")
    for slot in (2, 1, 0):
        release(cache, slots, slot)
    assert allocate(cache, slots, second, "x") == len(second) - 1


@given(st.lists(st.integers(0, 2)), st.lists(st.integers(0, 2)), st.integers(-1, 9))
def test_common_prefix(a, b, limit):
    """It is the longest equal beginning, of at most `limit` items."""
    length = 0
    while length < min(limit, len(a), len(b)) and a[length] == b[length]:
        length += 1
    assert common_prefix(tuple(a), tuple(b), limit) == length

"""Scheduler: which sequence advances by how many tokens."""

from __future__ import annotations

import random

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from service.engine.budget import Budget, Share
from service.engine.cache import KVCache
from service.engine.generation import Generation
from service.engine.scheduler import Scheduler
from service.engine.sequence import PromptGroup, Sequence
from service.engine.step import DecodeBatch, PromptChunk
from service.text.transcript import Transcript
from service.types import Prompt
from tests.support.fakes import request

SHARED = tuple(range(30))


def sequences(prompt, identity="x", n=1, max_tokens=3, priority=0, queued_at=0.0):
    """The candidates of one prompt."""
    made = request(Prompt(prompt, ""), identity=identity, n=n, max_tokens=max_tokens, priority=priority)
    group = PromptGroup(made.prompts[0], unstarted=n)
    generation = Generation(n, lambda _: None, clock=lambda: queued_at)
    return [Sequence(made, generation, group, 0, i, Transcript(), list(prompt)) for i in range(n)]


class Simulation:
    """Runs a scheduler over slots whose positions hold (identity, token), and checks all that it says."""

    def __init__(self, slots, prompt_chunk, exact=False):
        self.scheduler = Scheduler(KVCache(slots, exact=exact), prompt_chunk)
        self.prompt_chunk = prompt_chunk
        self.contents = [[] for _ in range(slots)]
        self.live = []
        self.ended = []
        self.chunks_in_a_row = 0
        self.computed = 0

    def add(self, made):
        self.live += made
        self.scheduler.add(made)

    def copy(self, copies):
        for copy in copies:
            assert copy.length <= len(self.contents[copy.source])
            self.contents[copy.target] = self.contents[copy.source][: copy.length]
            if copy.moves:
                self.contents[copy.source] = []

    def extend(self, sequence, start, end):
        slot = self.contents[sequence.slot]
        assert len(slot) >= start
        slot[start:] = [(sequence.request.identity, token) for token in sequence.tokens[start:end]]
        self.computed += end - start

    def end(self, sequence):
        self.copy(self.scheduler.remove(sequence))
        self.live.remove(sequence)
        self.ended.append(sequence)

    def step(self):
        """One step; False when there was none to do."""
        decoding = any(sequence.decoding for sequence in self.live)
        step = self.scheduler.schedule()
        if step is None:
            assert not self.live
            return False
        if not decoding:  # whoever decoded has ended: no stream has waited for the chunks so far
            self.chunks_in_a_row = 0
        if isinstance(step, PromptChunk):
            self.chunks_in_a_row += decoding and step.start < step.end
            assert self.chunks_in_a_row <= 1
            self.prompt(step)
        else:
            self.chunks_in_a_row = 0
            self.decode(step)
        self.check()
        return True

    def prompt(self, chunk):
        sequence = chunk.sequence
        assert chunk.end - chunk.start <= self.prompt_chunk
        assert chunk.end - chunk.start != 1 or sequence.prompt_length == 1
        self.copy(chunk.copies)
        if chunk.start == chunk.end:
            assert sequence.group.logits is not None
        self.extend(sequence, chunk.start, chunk.end)
        self.scheduler.commit_chunk(chunk)
        if chunk.end == sequence.prompt_length:
            sequence.group.unstarted -= 1
            sequence.group.logits = "computed" if sequence.group.unstarted else None
            self.generate(sequence)

    def decode(self, batch):
        assert batch.rows[-1] is not None
        rows = [row for row in batch.rows if row is not None]
        assert set(rows) == {sequence for sequence in self.live if sequence.decoding}
        for slot, row in enumerate(batch.rows):
            if row is not None:
                assert row.slot == slot
                self.extend(row, row.computed, row.computed + 1)
        self.scheduler.commit_batch(batch)
        for row in rows:
            self.generate(row)

    def generate(self, sequence):
        sequence.tokens.append(1000 + sequence.generated)
        if sequence.generated >= sequence.request.max_tokens:
            self.end(sequence)

    def check(self):
        """Held slots are dense, and every holder's slot holds its own first `computed` tokens."""
        holders = [sequence for sequence in self.live if sequence.slot is not None]
        assert sorted(sequence.slot for sequence in holders) == list(range(len(holders)))
        assert self.scheduler.running == len(holders)
        assert self.scheduler.waiting == len(self.live) - len(holders)
        for sequence in holders:
            expected = [(sequence.request.identity, token) for token in sequence.tokens[: sequence.computed]]
            assert self.contents[sequence.slot][: sequence.computed] == expected


@given(st.integers(0, 10**9), st.integers(1, 5), st.sampled_from([16, 17, 24]), st.booleans())
@example(341, 5, 24, False)  # all streams end between two chunks
def test_random_requests_and_aborts(seed, slots, prompt_chunk, exact):
    """For any arrivals and aborts, every sequence ends once and never reads another's positions."""
    draw = random.Random(seed)
    simulation = Simulation(slots, prompt_chunk, exact)
    added = []
    for _ in range(80):
        if draw.random() < 0.25:
            length = draw.choice([0, 0, 17, 30])
            prompt = SHARED[:length] + tuple(draw.randrange(3) for _ in range(draw.randrange(1, 40)))
            if simulation.ended and draw.random() < 0.3:  # a conversation goes on
                prompt = (*draw.choice(simulation.ended).tokens[:90], *prompt[:20])
            made = sequences(prompt, draw.choice("xyz"), draw.choice([1, 1, 3]), draw.randrange(1, 6))
            added += made
            simulation.add(made)
        elif simulation.live and draw.random() < 0.15:
            victim = draw.choice(simulation.live)
            for sequence in [each for each in simulation.live if each.group is victim.group]:
                simulation.end(sequence)
        simulation.step()
    while simulation.step():
        pass
    assert len(simulation.ended) == len(added)
    assert all(sequence.finished and sequence.slot is None for sequence in added)
    assert (simulation.scheduler.running, simulation.scheduler.waiting) == (0, 0)


def test_prompt_comes_in_chunks_between_decode_steps():
    """A running stream waits for at most one prompt chunk at a time."""
    simulation = Simulation(2, 16)
    scheduler = simulation.scheduler
    simulation.add(sequences((1, 2, 3), max_tokens=9))
    simulation.step()
    simulation.add(sequences(tuple(range(100, 140))))
    kinds = []
    for _ in range(6):
        step = scheduler.schedule()
        kinds.append((step.start, step.end) if isinstance(step, PromptChunk) else len(step.rows))
        if isinstance(step, PromptChunk):
            simulation.prompt(step)
        else:
            simulation.decode(step)
    assert kinds == [1, (0, 16), 1, (16, 32), 1, (32, 40)]


def test_no_chunk_of_one_token():
    """A prompt of one token more than a chunk leaves two for the last."""
    scheduler = Scheduler(KVCache(1), 16)
    (sequence,) = sequences(tuple(range(17)))
    scheduler.add([sequence])
    step = scheduler.schedule()
    assert (step.start, step.end) == (0, 15)
    scheduler.commit_chunk(step)
    step = scheduler.schedule()
    assert (step.start, step.end) == (15, 17)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_candidates_share_one_prompt(n):
    """However many candidates, the prompt's tokens are computed once."""
    simulation = Simulation(5, 16)
    simulation.add(sequences(SHARED, n=n, max_tokens=1))
    while simulation.step():
        pass
    assert simulation.computed == len(SHARED)


def test_first_come_first_served():
    """With one slot, sequences end in the order in which they came."""
    simulation = Simulation(1, 16)
    made = [sequences((index, index))[0] for index in range(4)]
    simulation.add(made)
    while simulation.step():
        pass
    assert simulation.ended == made


def serve(simulation, scheduler_steps=10**6):
    """Runs until there is no work, or for this many steps."""
    for _ in range(scheduler_steps):
        if not simulation.step():
            return


def test_a_flood_does_not_delay_another_caller():
    """With one slot and fifty requests of one caller waiting, another's is next after the one that runs."""
    simulation = Simulation(1, 16)
    flood = [sequences((index, index), "flood")[0] for index in range(50)]
    simulation.add(flood)
    simulation.step()
    (other,) = sequences((1, 2, 3), "other")
    simulation.add([other])
    serve(simulation)
    assert simulation.ended == [flood[0], other, *flood[1:]]


def test_callers_share_by_work():
    """One asks for answers three times as long as the other's: it gets a third as many, and about the same work."""
    simulation = Simulation(1, 16)
    long = [sequences((1, index), "long", max_tokens=30)[0] for index in range(20)]
    short = [sequences((2, index), "short", max_tokens=10)[0] for index in range(60)]
    simulation.add(long)
    simulation.add(short)
    while len(simulation.ended) < 40:
        simulation.step()
    counts = [sum(each.request.identity == name for each in simulation.ended) for name in ("long", "short")]
    assert counts == [10, 30]


def test_time_away_earns_nothing():
    """A new caller takes turns with one that had the model to itself for long."""
    simulation = Simulation(1, 16)
    simulation.add([sequences((1, index), "first", max_tokens=9)[0] for index in range(60)])
    while len(simulation.ended) < 40:
        simulation.step()
    simulation.add([sequences((2, index), "second", max_tokens=9)[0] for index in range(20)])
    while len(simulation.ended) < 61:
        simulation.step()
    later = [each.request.identity for each in simulation.ended[41:]]
    assert sorted(later) == ["first"] * 10 + ["second"] * 10


def test_callers_prompts_take_turns():
    """A long prompt of one caller does not hold another's short one back: chunks go to each in turn."""
    simulation = Simulation(2, 16)
    (long,) = sequences(tuple(range(160)), "long")
    simulation.add([long])
    simulation.step()
    (short,) = sequences(tuple(range(200, 220)), "short", max_tokens=1)
    simulation.add([short])
    serve(simulation, 5)
    assert short.finished
    assert 16 < long.computed < 160


def test_one_slot_of_sixteen_is_for_who_holds_none():
    """However much one caller asks for, another gets a slot at once; with few slots none is kept back."""
    for slots, kept in ((15, 0), (16, 1), (32, 2)):
        simulation = Simulation(slots, 16)
        simulation.add([sequences((index, 1), "flood", max_tokens=10**6)[0] for index in range(slots)])
        serve(simulation, 3 * slots)
        assert simulation.scheduler.running == slots - kept
        assert simulation.scheduler.load().space("flood").slots == 0
        assert simulation.scheduler.load().space("other").slots == min(kept, 1)
        if kept:
            others = [sequences((index, 2), "other", max_tokens=10**6)[0] for index in range(2)]
            simulation.add(others)
            serve(simulation, 3)
            assert [each.slot is None for each in others] == [False, True]


def test_batches_stay_in_order():
    """The sequences of one caller get their slots in the order in which they were asked for, between another's."""
    simulation = Simulation(3, 16)
    mine = [sequences((1, index), "me", n=3, max_tokens=4) for index in range(5)]
    yours = [sequences((2, index), "you", max_tokens=7) for index in range(9)]
    for batch in mine + yours:
        simulation.add(batch)
    started = []
    while simulation.step():
        started += [each for each in simulation.live if each.slot is not None and each not in started]
        started += [each for each in simulation.ended if each not in started]
    for batches in (mine, yours):
        wanted = [each for batch in batches for each in batch]
        assert [each for each in started if each in wanted] == wanted


def test_removing_in_every_state():
    """Waiting, in the middle of its prompt, or decoding: a removed sequence leaves nothing behind."""
    simulation = Simulation(2, 16)
    decoding, prompting, waiting = (sequences(tuple(range(base, base + 40)))[0] for base in (0, 100, 200))
    simulation.add([decoding, prompting, waiting])
    while prompting.computed == 0:
        simulation.step()
    assert decoding.decoding
    assert prompting.computed < 40
    for sequence in (waiting, prompting, decoding):
        simulation.end(sequence)
        simulation.check()
    assert simulation.scheduler.schedule() is None


def test_slot_of_a_prompt_in_progress_sits_decoding_out():
    """When the hole of an ended sequence is filled by one in its prompt, its row in the batch is None."""
    simulation = Simulation(3, 16)
    first, second = (sequences((base, base), max_tokens=9)[0] for base in (1, 2))
    third = sequences(tuple(range(100, 140)))[0]
    simulation.add([first, second])
    while not second.decoding:
        simulation.step()
    simulation.add([third])
    while third.computed == 0:
        simulation.step()
    simulation.end(first)
    assert (third.slot, second.slot) == (0, 1)
    assert simulation.scheduler.schedule() == DecodeBatch((None, second))


def test_all_but_one_token_in_the_cache_is_still_no_chunk_of_one():
    """A candidate whose prompt is almost complete in another prompt's slot computes two tokens."""
    simulation = Simulation(2, 32)
    first, second = sequences(SHARED, n=2, max_tokens=3)
    similar = sequences((*SHARED[:-1], 99), max_tokens=9)
    simulation.add([first])
    simulation.add(similar)
    simulation.add([second])
    while not first.finished:
        simulation.step()
    assert similar[0].slot == 0
    while not second.decoding:
        simulation.step()
    assert second.cached == len(SHARED) - 2


@pytest.mark.parametrize("prompt_chunk", [16, 128, 130, 512])
@pytest.mark.parametrize("length", [1, 2, 17, 128, 129, 130, 131, 257, 258, 385, 600])
def test_no_token_is_alone_in_a_tile(prompt_chunk, length):
    """Chunks cover a prompt without one of 1, 129, 257 ... tokens, whose last would take another kernel."""
    scheduler = Scheduler(KVCache(2), prompt_chunk)
    scheduler.add(sequences(tuple(range(length))))
    lengths = []
    while sum(lengths) < length:
        chunk = scheduler.schedule()
        lengths.append(chunk.end - chunk.start)
        scheduler.commit_chunk(chunk)
    assert max(lengths) <= prompt_chunk
    assert lengths == [1] or all(each % 128 != 1 for each in lengths)


def test_chunks_beside_streams_shrink_as_the_prompt_grows():
    """While a stream runs, later chunks are shorter, as attention takes longer; otherwise they keep their length."""
    for beside, last in ((False, 128), (True, 128 * 1280 // (1280 + 1900))):
        scheduler = Scheduler(KVCache(2), 128)
        if beside:
            (stream,) = sequences((1, 2), max_tokens=1000)
            scheduler.add([stream])
            scheduler.commit_chunk(scheduler.schedule())
            stream.tokens.append(3)
        (long,) = sequences(tuple(range(10, 3000)))
        scheduler.add([long])
        lengths = {}
        while long.computed < 1900:
            step = scheduler.schedule()
            if isinstance(step, PromptChunk):
                lengths[step.start] = step.end - step.start
                scheduler.commit_chunk(step)
        assert lengths[0] == 128
        assert abs(list(lengths.values())[-1] - last) <= 2
        assert min(lengths.values()) == list(lengths.values())[-1]


@pytest.mark.parametrize(("seconds", "most"), [(0.5, 40), (0.1, 16), (5.0, 128)])
def test_chunks_beside_streams_keep_to_their_time(seconds, most):
    """A chunk beside a stream takes as long as is allowed, at least 16 tokens; without a stream it is whole."""
    for beside in (False, True):
        scheduler = Scheduler(KVCache(2), 128, seconds)
        if beside:
            (stream,) = sequences((1, 2), max_tokens=1000)
            scheduler.add([stream])
            scheduler.commit_chunk(scheduler.schedule())
            stream.tokens.append(3)
        scheduler.times.prefill(128, 1.6)  # 0.0125 s a token
        scheduler.add(sequences(tuple(range(10, 400))))
        while not isinstance(step := scheduler.schedule(), PromptChunk):
            pass
        assert step.end - step.start == (most if beside else 128)


@pytest.mark.parametrize(("exact", "cached"), [(False, len(SHARED)), (True, len(SHARED) + 4)])
def test_the_first_candidate_keeps_what_it_generated(exact, cached):
    """All but its last token, where positions are exact; the others keep no more than the prompt."""
    share = Share(Budget())
    simulation = Simulation(6, 32)
    simulation.scheduler = Scheduler(KVCache(6, share, exact=exact), 32)
    made = sequences(SHARED, n=3, max_tokens=5)
    simulation.add(made)
    serve(simulation)
    assert share.kept_bytes <= cached + len(SHARED)
    (later,) = sequences((*made[0].tokens, 5, 6, 7))
    simulation.add([later])
    simulation.step()
    assert later.cached == cached


def with_memory(slots, positions):
    """A simulation with memory for this many positions."""
    simulation = Simulation(slots, 16)
    simulation.scheduler = Scheduler(KVCache(slots, Share(Budget(positions))), 16)
    return simulation


def test_sequences_run_as_their_positions_fit():
    """With memory for 100 positions and sequences of 40, two run at a time, however many slots there are."""
    simulation = with_memory(5, 100)
    simulation.add([sequences((index, *range(29)), max_tokens=10)[0] for index in range(6)])
    most = 0
    while simulation.step():
        most = max(most, simulation.scheduler.running)
    assert most == 2
    assert len(simulation.ended) == 6


def test_nobody_overtakes_a_sequence_that_does_not_fit():
    """A large one that came before small ones of other callers gets the memory as soon as there is enough."""
    simulation = with_memory(5, 100)
    (running,) = sequences((1, *range(29)), "running", max_tokens=40)
    (large,) = sequences((2, *range(29)), "large", max_tokens=60)
    small = [sequences((index, 1), f"small {index}", max_tokens=5)[0] for index in range(3, 6)]
    simulation.add([running])
    serve(simulation, 3)
    simulation.add([large])
    serve(simulation, 3)
    for each in small:
        simulation.add([each])
    serve(simulation, 10)
    assert simulation.scheduler.running == 1
    while not running.finished:
        simulation.step()
    simulation.step()
    assert large.slot is not None
    serve(simulation)
    assert simulation.ended[0] is running
    assert len(simulation.ended) == 5


def test_who_waited_for_memory_and_left_holds_nobody_up():
    """When the sequence that does not fit is removed, the next one starts."""
    simulation = with_memory(5, 100)
    running, large = (sequences((index, *range(29)), f"{index}", max_tokens=60)[0] for index in (1, 2))
    (small,) = sequences((3, 1), "small", max_tokens=5)
    for each in (running, large, small):
        simulation.add([each])
        serve(simulation, 4)
    assert small.slot is None
    simulation.end(large)
    serve(simulation, 4)
    assert small.slot is not None


def test_kept_prompts_give_way():
    """Memory for one sequence and a prompt: each new sequence gives up the prompt of the one before."""
    simulation = with_memory(3, 50)
    for index in range(4):
        simulation.add([sequences((index, *range(29)), "x", max_tokens=10)[0]])
        serve(simulation)
        assert sum(map(len, simulation.contents)) <= 50
    assert len(simulation.ended) == 4


def test_a_prompt_that_fills_the_memory_is_reused_in_place():
    """The conversation goes on: its own prompt, which fills most of the memory, need not be computed again."""
    simulation = with_memory(2, 64)
    prompt = tuple(range(40))
    simulation.add(sequences(prompt, max_tokens=4))
    serve(simulation)
    simulation.computed = 0
    simulation.add(sequences((*prompt, 50, 51, 52), max_tokens=4))
    serve(simulation)
    assert simulation.computed < 10


def admitted(scheduler, now=0.0):
    """Runs the scheduler until all prompts are computed; their callers and first tokens, in the order of turns."""
    order = []
    while (step := scheduler.schedule(now)) is not None:
        order.append((step.sequence.request.identity, step.sequence.tokens[0]))
        scheduler.commit_chunk(step)
        scheduler.remove(step.sequence)
    return order


def test_priority_orders_one_callers_requests():
    """Lower numbers first, equal ones in their order, the candidates of one request together."""
    scheduler = Scheduler(KVCache(1), 16)
    for token, priority in enumerate([0, 5, -5, 0, -5]):
        scheduler.add(sequences((token,), n=2, priority=priority))
    assert [token for _, token in admitted(scheduler)] == [2, 2, 4, 4, 0, 0, 3, 3, 1, 1]


def test_priority_never_passes_another_caller():
    """The turns of callers are the same as without it."""
    orders = []
    for priority in (0, -100):
        scheduler = Scheduler(KVCache(1), 16)
        for token in range(4):
            scheduler.add(sequences((token,), identity="ann", priority=priority))
            scheduler.add(sequences((token,), identity="bob"))
        orders.append([identity for identity, _ in admitted(scheduler)])
    assert orders[0] == orders[1]


def test_what_has_waited_long_comes_before_urgent_requests():
    """However urgent they are and keep coming: the oldest first."""
    scheduler = Scheduler(KVCache(1), 16, patience=15.0)
    scheduler.add(sequences((1,), priority=50, queued_at=100.0))
    scheduler.add(sequences((2,), priority=20, queued_at=110.0))
    scheduler.add(sequences((3,), priority=-9, queued_at=114.0))
    assert [token for _, token in admitted(scheduler, 115.5)] == [1, 3, 2]


def test_an_urgent_request_before_one_that_waits_for_memory():
    """It takes the turn if it fits; the other has its memory when its turn comes."""
    scheduler = Scheduler(KVCache(2, Share(Budget(40))), 16)
    scheduler.add(sequences((1,) * 20, max_tokens=10, identity="a"))
    first = scheduler.schedule()
    scheduler.commit_chunk(first)
    scheduler.add(sequences((2,) * 20, max_tokens=10, priority=5, identity="a"))
    scheduler.add(sequences((3,), max_tokens=3, priority=1, identity="a"))
    chunk = scheduler.schedule()
    while chunk.end < 20:
        scheduler.commit_chunk(chunk)
        chunk = scheduler.schedule()
    scheduler.commit_chunk(chunk)
    assert scheduler.schedule().sequence.tokens[0] == 3

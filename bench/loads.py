"""The loads: the requests that each of them sends to a peer, and the figures that it gives.

A plan is the size of the loads: the options of `python -m bench`, whose help says what each means, with the `tokenizer`
of the model and `context`, its longest sequence in tokens.
"""

from __future__ import annotations

import random
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate, count, takewhile
from statistics import mean, median

from bench.client import Job, Run, Timing, percentile

# Control tokens and single bytes have ids below this one.
_FIRST_WORD = 1000


# Unit, which direction is better (see Figure), and how the number follows from a run; None where the peer lacks it.
Metric = tuple[str, str, Callable[[Run], float | None]]


@dataclass(frozen=True)
class Load:
    """Requests and the figures that follow from them.

    In a closed loop, `concurrency` callers send the requests one after the other. In an open loop, `moments` holds the
    second at which each request arrives, whether or not earlier ones are done: `concurrency` is the number of all
    requests. Refusals are errors unless `refusable`.
    """

    work: Sequence[Job]
    metrics: Mapping[str, Metric]
    concurrency: int = 1
    moments: Sequence[float] = ()
    size: float | None = None
    refusable: bool = False


TTFT_PROMPT = 512
CHATS = 8
CHAT_TURNS = 4
SYSTEM_TOKENS = 256
USER_TOKENS = 32
REPLY_TOKENS = 48
STALL_PROMPT = 2000
STALL_TOKENS = 320

# Growth: the sizes of its curves, and the requests behind them.
GROWTH_SIZES = (1, 2, 4, 8, 16, 32, 64)
GROWTH_PROMPT = 128
GROWTH_TOKENS = 64
GROWTH_PROMPTS = (128, 256, 512, 1024, 2048, 4096)

# Overload and scaling: callers that never pause, and their requests.
CALLERS = 16
CALLER_PROMPT = 64
CALLER_TOKENS = 32
# The wait that an overloaded service may allow. Answers count whose first token comes within twice that time.
QUEUE_SECONDS = 4.0
# Requests arrive until ARRIVAL_SECONDS. Answers count that end after SETTLE_SECONDS: from then on the queue is full.
ARRIVAL_SECONDS = 22.0
SETTLE_SECONDS = 7.0

METRICS: dict[str, Metric] = {
    "output rate": ("tokens/s", "more", lambda run: run.tokens / run.seconds),
    "time to first token, p50": ("s", "less", lambda run: median(t.first for t in run.timings)),
    "time to first token, p95": ("s", "less", lambda run: percentile([t.first for t in run.timings], 95)),
    "between tokens, p50": ("ms", "less", lambda run: 1000 * percentile(_gaps(run), 50)),
    "between tokens, p95": ("ms", "less", lambda run: 1000 * percentile(_gaps(run), 95)),
    "mean between tokens, p95": (
        "ms",
        "less",
        lambda run: 1000 * percentile([t.seconds_per_token for t in run.timings], 95),
    ),
    "answer, p95": ("s", "less", lambda run: percentile([t.at[-1] - t.began for t in run.timings], 95)),
    "time to first token from turn 2 on, p50": (
        "s",
        "less",
        lambda run: median(t.first for t in run.timings if t.turn > 0),
    ),
    "prompt tokens from cache, mean": ("tokens", "", lambda run: mean(t.cached for t in run.timings)),
    "prefix-cache hit rate": (
        "of prompt tokens",
        "more",
        lambda run: sum(t.cached for t in run.timings) / sum(t.prompt_tokens for t in run.timings),
    ),
    # All choices of a request generate one token each in this time.
    "a token": ("ms", "less", lambda run: 1000 * median(_decode_seconds(t) for t in run.timings)),
    "event loop, processor time a token": ("ms", "", lambda run: _share(run, "event loop", run.tokens / 1000)),
    "Envoy, processor time a token": ("ms", "", lambda run: _share(run, "Envoy", run.tokens / 1000)),
    "in the model": ("% of the time", "", lambda run: _share(run, "model", run.seconds / 100)),
    "resident": ("MiB", "less", lambda run: run.resident / 2**20),
    "refused": ("of requests", "", lambda run: len(run.refusals) / (len(run.timings) + len(run.refusals))),
    "refusal, p95": ("ms", "less", lambda run: 1000 * percentile(run.refusals or [0.0], 95)),
}


def _gaps(run: Run) -> list[float]:
    return [gap for timing in run.timings for gap in timing.gaps]


def _decode_seconds(timing: Timing) -> float:
    return (timing.at[-1] - timing.at[0]) / (GROWTH_TOKENS - 1)


def _share(run: Run, counter: str, whole: float) -> float | None:
    return run.spent[counter] / whole if counter in run.spent else None


def _metrics(*names: str) -> dict[str, Metric]:
    return {name: METRICS[name] for name in names}


def table(plan: Namespace) -> dict[str, list[Load]]:
    """The loads by name: for each of its sizes, where it has several, its requests and its figures."""
    growth = _metrics("output rate", "time to first token, p50", "a token", "resident")
    closed = _metrics(
        *("output rate", "time to first token, p50", "between tokens, p50", "between tokens, p95"),
        *("event loop, processor time a token", "Envoy, processor time a token", "in the model"),
    )
    batches = {size: prompts(plan, f"growth {size}", size, GROWTH_PROMPT) for size in GROWTH_SIZES}
    longest = plan.context - GROWTH_TOKENS
    return {
        # A number of requests keeps running until all work is done.
        "closed": [
            Load(
                jobs(plan, f"closed {size}", max(4, size * plan.requests_each), plan.prompt_tokens, plan.new_tokens),
                closed,
                concurrency=size,
                size=size,
            )
            for size in plan.concurrency
        ],
        # The first token of a long prompt on an idle server.
        "ttft": [Load(jobs(plan, "ttft", 5, TTFT_PROMPT, 1), _metrics("time to first token, p50"))],
        # Conversations that begin with the same system prompt.
        "chat": [
            Load(
                _conversations(plan, "chat", CHATS * prompts(plan, "chat system", 1, SYSTEM_TOKENS)),
                _metrics("output rate", "time to first token from turn 2 on, p50", "prompt tokens from cache, mean"),
                CHATS,
            )
        ],
        "open": [_open_loop(plan)],
        # Growth: requests of one prompt each, more and more of them at once.
        "concurrency": [
            Load([Job((prompt,), GROWTH_TOKENS) for prompt in batch], growth, concurrency=size, size=size)
            for size, batch in batches.items()
        ],
        # Growth: one request whose prompt gets longer, up to the context.
        "prompt-length": [
            Load(jobs(plan, f"growth to {length}", 1, length, GROWTH_TOKENS), growth, size=length)
            for length in (*(length for length in GROWTH_PROMPTS if length < longest), longest)
        ],
        # Growth: one request of more and more prompts.
        "prompts": [Load([Job(tuple(batch), GROWTH_TOKENS)], growth, size=size) for size, batch in batches.items()],
        # Growth: one request of one prompt and more and more choices.
        "choices": [
            Load([Job((batch[0],), GROWTH_TOKENS, n=size)], growth, size=size) for size, batch in batches.items()
        ],
        # Scaling: callers that never pause, each request in its own session.
        "callers": [
            Load(
                [
                    Job((prompt,), CALLER_TOKENS, session=f"one-{number}")
                    for number, prompt in enumerate(prompts(plan, "callers", 2 * CALLERS, CALLER_PROMPT))
                ],
                _metrics("output rate"),
                CALLERS,
            )
        ],
        # Conversations with a system prompt each: prefix-cache hits.
        "sessions": [
            Load(
                _conversations(plan, "sessions", prompts(plan, "sessions system", CHATS, SYSTEM_TOKENS)),
                _metrics("prefix-cache hit rate", "output rate", "time to first token from turn 2 on, p50"),
                CHATS,
            )
        ],
    }


COMPARED = ("closed", "ttft", "chat", "open", "stall")
CURVES = ("concurrency", "prompt-length", "prompts", "choices")


def _open_loop(plan: Namespace) -> Load:
    """Requests that arrive at random moments, whether or not earlier ones are done: how many meet the objective."""
    pick = random.Random(f"{plan.seed} arrivals")
    moments = list(accumulate(pick.expovariate(plan.rate) for _ in range(plan.arrivals)))
    work = jobs(plan, "open", plan.arrivals, plan.prompt_tokens, plan.new_tokens // 2)
    return Load(
        work,
        {
            "goodput": (
                "requests/s",
                "more",
                lambda run: (
                    sum(
                        t.first <= plan.ttft_objective and t.seconds_per_token <= plan.itl_objective
                        for t in run.timings
                    )
                    / moments[-1]
                ),
            ),
            "arrivals": ("requests/s", "", lambda run: len(run.timings) / moments[-1]),
            **_metrics("time to first token, p95", "mean between tokens, p95"),
        },
        concurrency=len(work),
        moments=moments,
    )


def offered(plan: Namespace, share: float, rate: float) -> Load:
    """`rate` requests per second at random moments, `share` times the sustainable rate; a refused one is not repeated.

    Goodput counts the answers that ended from SETTLE_SECONDS to ARRIVAL_SECONDS and kept 2 * QUEUE_SECONDS
    to the first token.
    """
    pick = random.Random(f"{plan.seed} overload {share}")
    endless = accumulate(pick.expovariate(rate) for _ in count())
    moments = list(takewhile(lambda moment: moment < ARRIVAL_SECONDS, endless))
    work = jobs(plan, f"overload {share}", len(moments), CALLER_PROMPT, CALLER_TOKENS)
    return Load(
        work,
        {
            "offered": ("requests/s", "", lambda _: rate),
            "goodput": (
                "requests/s",
                "more",
                lambda run: (
                    sum(
                        t.first <= 2 * QUEUE_SECONDS
                        for t in run.timings
                        if SETTLE_SECONDS <= t.at[-1] - run.began < ARRIVAL_SECONDS
                    )
                    / (ARRIVAL_SECONDS - SETTLE_SECONDS)
                ),
            ),
            **_metrics("refused", "time to first token, p50", "time to first token, p95"),
            **_metrics("answer, p95", "refusal, p95", "resident"),
        },
        concurrency=len(work),
        moments=moments,
        size=share,
        refusable=True,
    )


def longest_sequence(prompt_tokens: int, new_tokens: int) -> int:
    """Tokens of prompt and answer in the longest request of the loads in COMPARED, with these in the closed loop."""
    chat_tokens = SYSTEM_TOKENS + CHAT_TURNS * (USER_TOKENS + 2 * REPLY_TOKENS)
    return max(STALL_PROMPT + 1, TTFT_PROMPT + 1, prompt_tokens + max(new_tokens, STALL_TOKENS), chat_tokens)


def jobs(plan: Namespace, load: str, count: int, prompt_tokens: int, new_tokens: int) -> list[Job]:
    """Requests with one random prompt each."""
    return [Job((prompt,), new_tokens) for prompt in prompts(plan, load, count, prompt_tokens)]


def prompts(plan: Namespace, load: str, count: int, tokens: int) -> list[tuple[int, ...]]:
    """Random prompts that share no beginning, the same for every peer and round."""
    pick = random.Random(f"{plan.seed} {load}")
    vocabulary = plan.tokenizer.get_vocab_size()
    words = range(min(_FIRST_WORD, vocabulary // 2), vocabulary)
    return [tuple(pick.choices(words, k=tokens)) for _ in range(count)]


def _conversations(plan: Namespace, load: str, systems: Sequence[tuple[int, ...]]) -> list[Job]:
    """A conversation in its own session for each system prompt; it sends everything before with every turn."""
    questions = prompts(plan, f"{load} questions", CHAT_TURNS * len(systems), USER_TOKENS)
    turns = [questions[number :: len(systems)] for number in range(len(systems))]
    return [
        Job((system + first,), REPLY_TOKENS, reuse=True, session=f"{load}-{number}", follow_ups=tuple(others))
        for number, (system, (first, *others)) in enumerate(zip(systems, turns, strict=True))
    ]

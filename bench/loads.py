"""The loads: the requests that each of them sends to a peer, and the figures that it gives."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, count, takewhile
from statistics import mean, median

from tokenizers import Tokenizer

from bench.client import Job, percentile
from bench.drive import Load, Metric, Run

# Control tokens and single bytes have ids below this one.
_FIRST_WORD = 1000


@dataclass(frozen=True)
class Plan:
    """The size of the loads; the flags of `python -m bench` say what each field means. Times are in seconds.

    `context` is the longest sequence of the model, in tokens.
    """

    tokenizer: Tokenizer
    context: int
    concurrency: Sequence[int]
    requests_each: int
    prompt_tokens: int
    new_tokens: int
    rate: float
    arrivals: int
    ttft_objective: float
    itl_objective: float
    seed: int
    limit: float


TTFT_PROMPT = 512
TTFT_REQUESTS = 5
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
# The wait that an overloaded service may allow, and the time to the first token that an answer must keep to count.
QUEUE_SECONDS = 4.0
OVERLOAD_OBJECTIVE = 2 * QUEUE_SECONDS
# Requests arrive until ARRIVAL_SECONDS. Answers count that end after SETTLE_SECONDS: from then on the queue is full.
ARRIVAL_SECONDS = 22.0
SETTLE_SECONDS = 7.0

METRICS: dict[str, Metric] = {
    "output rate": ("tokens/s", "more", lambda run: run.output_rate),
    "time to first token, p50": ("s", "less", lambda run: median(t.first for t in run.timings)),
    "time to first token, p95": ("s", "less", lambda run: percentile([t.first for t in run.timings], 95)),
    "between tokens, p50": ("ms", "less", lambda run: 1000 * percentile(_gaps(run), 50)),
    "between tokens, p95": ("ms", "less", lambda run: 1000 * percentile(_gaps(run), 95)),
    "mean between tokens, p95": (
        "ms",
        "less",
        lambda run: 1000 * percentile([t.seconds_per_token for t in run.timings], 95),
    ),
    "answer, p95": ("s", "less", lambda run: percentile([t.duration for t in run.timings], 95)),
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
    "resident": ("MiB", "less", lambda run: run.resident / 2**20),
    "refused": ("of requests", "", lambda run: len(run.refusals) / (len(run.timings) + len(run.refusals))),
    "refusal, p95": ("ms", "less", lambda run: 1000 * percentile(run.refusals or [0.0], 95)),
}


def _gaps(run: Run) -> list[float]:
    return [gap for timing in run.timings for gap in timing.gaps]


def _metrics(*names: str) -> dict[str, Metric]:
    return {name: METRICS[name] for name in names}


CLOSED_LOOP = _metrics("output rate", "time to first token, p50", "between tokens, p50", "between tokens, p95")
CHAT = _metrics("output rate", "time to first token from turn 2 on, p50", "prompt tokens from cache, mean")
SESSIONS = _metrics("prefix-cache hit rate", "output rate", "time to first token from turn 2 on, p50")
OVERLOAD = _metrics(
    "refused", "time to first token, p50", "time to first token, p95", "answer, p95", "refusal, p95", "resident"
)
GROWTH = {
    **_metrics("output rate", "time to first token, p50"),
    # All choices of a request generate one token each in this time.
    "a token": (
        "ms",
        "less",
        lambda run: 1000 * median((t.at[-1] - t.at[0]) / (GROWTH_TOKENS - 1) for t in run.timings),
    ),
    **_metrics("resident"),
}


def closed(plan: Plan) -> list[Load]:
    """Keeps a number of requests running until all work is done: output tokens per second."""
    counts = {size: max(4, size * plan.requests_each) for size in plan.concurrency}
    shape = (plan.prompt_tokens, plan.new_tokens)
    return [
        Load(jobs(plan, f"closed {size}", requests, *shape), CLOSED_LOOP, size, size=size)
        for size, requests in counts.items()
    ]


def ttft(plan: Plan) -> list[Load]:
    """The first token of a long prompt on an idle server."""
    return [Load(jobs(plan, "ttft", TTFT_REQUESTS, TTFT_PROMPT, 1), _metrics("time to first token, p50"))]


def chat(plan: Plan) -> list[Load]:
    """Conversations that begin with the same system prompt and send the whole conversation again with every turn."""
    pick = _random(plan, "chat")
    system = _prompt(plan, pick, SYSTEM_TOKENS)
    return [Load([_conversation(plan, pick, system) for _ in range(CHATS)], CHAT, CHATS)]


def sessions(plan: Plan) -> list[Load]:
    """Conversations as in `chat`, each in its own session and with its own system prompt: prefix-cache hits."""
    pick = _random(plan, "sessions")
    chats = [_conversation(plan, pick, _prompt(plan, pick, SYSTEM_TOKENS)) for _ in range(CHATS)]
    return [Load([replace(job, session=f"chat-{number}") for number, job in enumerate(chats)], SESSIONS, CHATS)]


def open_loop(plan: Plan) -> list[Load]:
    """Requests that arrive at random moments, whether or not earlier ones are done: how many meet the objective."""
    pick = _random(plan, "arrivals")
    moments = list(accumulate(pick.expovariate(plan.rate) for _ in range(plan.arrivals)))
    work = jobs(plan, "open", plan.arrivals, plan.prompt_tokens, plan.new_tokens // 2)

    def goodput(run: Run) -> float:
        met = [t.first <= plan.ttft_objective and t.seconds_per_token <= plan.itl_objective for t in run.timings]
        return sum(met) / moments[-1]

    metrics = {
        "goodput": ("requests/s", "more", goodput),
        "arrivals": ("requests/s", "", lambda run: len(run.timings) / moments[-1]),
        **_metrics("time to first token, p95", "mean between tokens, p95"),
    }
    return [Load(work, metrics, moments=moments)]


def concurrency(plan: Plan) -> list[Load]:
    """Growth: requests of one prompt each, more and more of them at once."""
    return [
        Load(jobs(plan, f"growth {size}", size, GROWTH_PROMPT, GROWTH_TOKENS), GROWTH, size, size=size)
        for size in GROWTH_SIZES
    ]


def prompt_length(plan: Plan) -> list[Load]:
    """Growth: one request whose prompt gets longer, up to the context."""
    longest = plan.context - GROWTH_TOKENS
    lengths = [*(length for length in GROWTH_PROMPTS if length < longest), longest]
    return [Load(jobs(plan, f"growth {length}", 1, length, GROWTH_TOKENS), GROWTH, size=length) for length in lengths]


def prompts(plan: Plan) -> list[Load]:
    """Growth: one request of more and more prompts."""
    work = {size: jobs(plan, f"growth prompts {size}", size, GROWTH_PROMPT, GROWTH_TOKENS) for size in GROWTH_SIZES}
    return [
        Load([Job(tuple(job.prompts[0] for job in single), GROWTH_TOKENS)], GROWTH, size=size)
        for size, single in work.items()
    ]


def choices(plan: Plan) -> list[Load]:
    """Growth: one request of one prompt and more and more choices."""
    work = jobs(plan, "growth choices", len(GROWTH_SIZES), GROWTH_PROMPT, GROWTH_TOKENS)
    return [Load([replace(job, n=size)], GROWTH, size=size) for size, job in zip(GROWTH_SIZES, work, strict=True)]


def callers(plan: Plan) -> list[Load]:
    """Scaling: callers that never pause, each request in its own session."""
    work = jobs(plan, "callers", 2 * CALLERS, CALLER_PROMPT, CALLER_TOKENS)
    sessions = [replace(job, session=f"one-{number}") for number, job in enumerate(work)]
    return [Load(sessions, _metrics("output rate"), CALLERS)]


def offered(plan: Plan, share: float, rate: float) -> Load:
    """`rate` requests per second at random moments, `share` times the sustainable rate; a refused one is not repeated.

    Goodput counts the answers that ended from SETTLE_SECONDS to ARRIVAL_SECONDS and kept OVERLOAD_OBJECTIVE.
    """
    pick = _random(plan, f"overload {share}")
    endless = accumulate(pick.expovariate(rate) for _ in count())
    moments = list(takewhile(lambda moment: moment < ARRIVAL_SECONDS, endless))
    work = jobs(plan, f"overload {share}", len(moments), CALLER_PROMPT, CALLER_TOKENS)

    def goodput(run: Run) -> float:
        ended = [t for t in run.timings if SETTLE_SECONDS <= t.at[-1] - run.began < ARRIVAL_SECONDS]
        return sum(t.first <= OVERLOAD_OBJECTIVE for t in ended) / (ARRIVAL_SECONDS - SETTLE_SECONDS)

    metrics = {
        "offered": ("requests/s", "", lambda _: rate),
        "goodput": ("requests/s", "more", goodput),
        **OVERLOAD,
    }
    return Load(work, metrics, moments=moments, size=share, refusable=True)


LOADS: dict[str, Callable[[Plan], list[Load]]] = {
    "closed": closed,
    "ttft": ttft,
    "chat": chat,
    "open": open_loop,
    "concurrency": concurrency,
    "prompt-length": prompt_length,
    "prompts": prompts,
    "choices": choices,
    "callers": callers,
    "sessions": sessions,
}
COMPARED = ("closed", "ttft", "chat", "open", "stall")
CURVES = ("concurrency", "prompt-length", "prompts", "choices")


def longest_sequence(prompt_tokens: int, new_tokens: int) -> int:
    """Tokens of prompt and answer in the longest request of the loads in COMPARED, with these in the closed loop."""
    chat_tokens = SYSTEM_TOKENS + CHAT_TURNS * (USER_TOKENS + 2 * REPLY_TOKENS)
    return max(STALL_PROMPT + 1, TTFT_PROMPT + 1, prompt_tokens + max(new_tokens, STALL_TOKENS), chat_tokens)


def jobs(plan: Plan, load: str, count: int, prompt_tokens: int, new_tokens: int) -> list[Job]:
    """Requests with random prompts that share no beginning, the same for every peer and round."""
    pick = _random(plan, load)
    return [Job((_prompt(plan, pick, prompt_tokens),), new_tokens) for _ in range(count)]


def _conversation(plan: Plan, pick: random.Random, system: tuple[int, ...]) -> Job:
    """A system prompt with the first of CHAT_TURNS questions; the other questions follow."""
    first, *others = (_prompt(plan, pick, USER_TOKENS) for _ in range(CHAT_TURNS))
    return Job((system + first,), REPLY_TOKENS, reuse=True, follow_ups=tuple(others))


def _prompt(plan: Plan, pick: random.Random, length: int) -> tuple[int, ...]:
    vocabulary = plan.tokenizer.get_vocab_size()
    low = min(_FIRST_WORD, vocabulary // 2)
    return tuple(pick.randrange(low, vocabulary) for _ in range(length))


def _random(plan: Plan, load: str) -> random.Random:
    return random.Random(f"{plan.seed} {load}")

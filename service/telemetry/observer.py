"""The events that the service reports while it works, and the interface of their observers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum


class Outcome(Enum):
    """How a completion request ended."""

    COMPLETED = "completed"
    CANCELLED = "cancelled"
    DEADLINE = "deadline"
    SLOW_READER = "slow_reader"
    FAILED = "failed"
    REFUSED = "refused"


class Refusal(Enum):
    """Why a completion request was refused before it began."""

    INVALID = "invalid"
    UNAUTHENTICATED = "unauthenticated"
    FORBIDDEN = "forbidden"
    UNKNOWN_MODEL = "unknown_model"
    OVERLOADED = "overloaded"
    TOKENS_PER_MINUTE = "tokens_per_minute"
    DEADLINE = "deadline"
    STOPPING = "stopping"


@dataclass(frozen=True, slots=True)
class Method:
    """A method of the gRPC server; `kind` is unary, client_stream, server_stream or bidi_stream."""

    service: str
    name: str
    kind: str


@dataclass(frozen=True, slots=True)
class Usage:
    """The parameters and the consumption of a completion request that the engine accepted.

    Seconds count from the start of the call, and are None for stages that the request did not reach: it waited from
    `queued_seconds` to `started_seconds`, and the first piece of its answer came at `first_token_seconds`. Tokens are
    those of all candidates, shown or not; `longest` counts those of the longest candidate. Of the sequences, `stopped`
    ended at an end token or a stop text, and `cut_off` at their length.
    """

    id: str
    model: str
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    sequences: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    longest: int
    stopped: int
    cut_off: int
    queued_seconds: float
    started_seconds: float | None
    first_token_seconds: float | None


@dataclass(frozen=True, slots=True)
class Ended:
    """A completion request that has ended, `seconds` after its call began.

    `refusal` is set if it was refused, and `usage` if the engine accepted it. `status` is the number of the gRPC
    status. `trace` has the caller's traceparent and tracestate, if it sent them. `model` is the id of the served model,
    and empty if the request named no served model.
    """

    method: Method
    request_id: str
    outcome: Outcome
    refusal: Refusal | None
    status: int
    seconds: float
    usage: Usage | None
    trace: Mapping[str, str]
    model: str = ""


class Observer:
    """The base of observers, which ignores all events. Event loop and step thread call it: no method may block."""

    def prefill_step(self, seconds: float) -> None:
        """The model has computed a prompt chunk."""

    def decode_step(self, rows: int, seconds: float) -> None:
        """The model has advanced `rows` sequences by one token each."""

    def prefill_ended(self, tokens: int) -> None:
        """The prefill of a prompt of `tokens` tokens is complete."""

    def sampled(self, tokens: int, gaps: Sequence[float]) -> None:
        """`tokens` tokens were sampled. `gaps` are the seconds since the previous token of each sequence, if any."""

    def call_began(self, method: Method) -> None:
        """A call has begun."""

    def call_ended(self, method: Method, code: str, seconds: float) -> None:
        """A call has ended with the status named `code` (OK, INVALID_ARGUMENT, ...)."""

    def request_ended(self, ended: Ended) -> None:
        """A completion request has ended."""

    def failed_unexpectedly(self) -> None:
        """A call has failed with an error of no known class."""

"""What the service tells of itself while it works. Who listens is no concern of those who tell."""

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
    """Why a completion request never began."""

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
    """A method of the server; `kind` is unary, client_stream, server_stream or bidi_stream."""

    service: str
    name: str
    kind: str


@dataclass(slots=True)
class Usage:
    """What a completion request asked for, in numbers, and what it came to, once the engine had taken it.

    Seconds are since its call began, and None where it did not get so far: it waited from `queued_seconds` to
    `started_seconds`; the first piece of its answer came at `first_token_seconds`. Tokens are those of all candidates,
    shown or not, `longest` those of the one that has most. Of its sequences `stopped` met an end token or a stop text,
    and `cut_off` their length.
    """

    id: str
    model: str
    max_tokens: int
    temperature: float
    top_p: float
    n: int
    sequences: int
    prompt_tokens: int
    cached_tokens: int = 0
    completion_tokens: int = 0
    longest: int = 0
    stopped: int = 0
    cut_off: int = 0
    queued_seconds: float | None = None
    started_seconds: float | None = None
    first_token_seconds: float | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """A completion request that has ended, `seconds` after its call began.

    `refusal` is set if it was refused, `usage` if the engine had taken it. `status` is gRPC's number; `trace` are the
    caller's traceparent and tracestate, where it sent any. `model` is the id of the served model, empty where it named
    none.
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
    """Is told what happens, and takes no note of it. It is called on the event loop and the step thread: never wait."""

    def prompt_step(self, seconds: float) -> None:
        """The model has read a chunk of a prompt."""

    def decode_step(self, rows: int, seconds: float) -> None:
        """The model has advanced `rows` sequences by one token each."""

    def prompt_read(self, tokens: int) -> None:
        """A prompt of so many tokens has been read to its end."""

    def sampled(self, tokens: int, gaps: Sequence[float]) -> None:
        """So many tokens were sampled; `gaps` are the seconds since their sequences' last, where there was one."""

    def call_began(self, method: Method) -> None:
        """A call has come in."""

    def call_ended(self, method: Method, code: str, seconds: float) -> None:
        """A call has ended with the status of this name (OK, INVALID_ARGUMENT, ...)."""

    def request_ended(self, ended: Ended) -> None:
        """A completion request has ended."""

    def failed_unexpectedly(self) -> None:
        """A call has failed by an error that has no name."""

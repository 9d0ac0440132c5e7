"""What the parts of the service hand to each other: requests, valid by construction, and pieces of the answer."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the model sees it.

    `token_ids` is never empty. The first `implied` of them (an added beginning-of-sequence token, or the stand-in for
    an empty prompt) have no text. `text` is what `echo` gives back; `tail` are the bytes of a character that the
    prompt's last tokens leave unfinished, and that the completion may finish.
    """

    token_ids: tuple[int, ...]
    text: str
    implied: int = 0
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen; ranges as in the contract. `top_k` 0 is off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: Mapping[int, float] | None = None
    seed: int = 0

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is always taken: below 1e-5 a temperature leaves it no rival."""
        return self.temperature < 1e-5


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed request: every field is within its range, and every prompt fits the context with `max_tokens`.

    `best_of` candidates are generated per prompt, of which `n` are answered. `stop_token_ids` holds the model's end
    tokens too, unless the caller ignores them. `identity` is the caller's, derived by the service: cached prompts are
    never shared across identities. What has a default is as if the caller had not asked for it.
    """

    id: str
    model: str
    created: int
    identity: str
    prompts: tuple[Prompt, ...]
    max_tokens: int
    n: int = 1
    best_of: int = 1
    stream: bool = False
    include_usage: bool = False
    continuous_usage: bool = False
    logprobs: int | None = None
    echo: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    min_tokens: int = 0
    sampling: SamplingParams = SamplingParams()


@dataclass(frozen=True, slots=True)
class Token:
    """One scored token of an answer.

    `offset` is in code points from the start of the prompt. `logprob` is None, and `top` too, where nothing precedes
    the token; else `top` holds the likeliest tokens and this one by falling log probability.
    """

    text: str
    offset: int
    logprob: float | None
    top: tuple[tuple[str, float], ...] | None


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one candidate's answer.

    `text` is final: no later piece takes it back. `tokens` are the scores of its tokens, empty unless asked for.
    `completion_tokens` and `cached_tokens` count from the candidate's start. `mean_logprob` is set with the last piece
    where candidates are ranked.
    """

    prompt_index: int
    candidate: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None
    completion_tokens: int
    cached_tokens: int
    mean_logprob: float | None = None

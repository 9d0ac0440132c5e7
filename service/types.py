"""The types that packages of the service share: requests, valid by construction, and pieces of the answer."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


class FinishReason(enum.Enum):
    """Why a choice ended."""

    STOP = "stop"
    LENGTH = "length"


@dataclass(frozen=True, slots=True)
class Prompt:
    """One prompt as the model sees it.

    `token_ids` is never empty. The first `implied` tokens have no text: an added beginning-of-sequence token, or the
    token that replaces an empty prompt. `echo` returns `text`. `tail` are the bytes of an unfinished character at the
    prompt's end, which the completion may finish.
    """

    token_ids: tuple[int, ...]
    text: str
    implied: int = 0
    tail: bytes = b""


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is chosen. The contract has the ranges; `top_k` 0 means no limit."""

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
        """Whether the likeliest token is always chosen: with a temperature below 1e-5 no other has a chance."""
        return self.temperature < 1e-5


class BannedTexts(Protocol):
    """Texts that must not appear. `reach` is how many bytes before a token decide with it whether it completes one."""

    reach: int

    def completing(self, text: bytes) -> npt.NDArray[np.int64]:
        """The ids of the tokens that would complete a banned text at the end of `text`."""


@dataclass(frozen=True, slots=True)
class Request:
    """A parsed request: every field is within its range, and every prompt fits the context with `max_tokens`.

    `best_of` candidates are generated per prompt, of which `n` are returned. `stop_token_ids` includes the model's end
    tokens, unless the caller ignores them; `own_stop_token_ids` are those that the caller named, and `control_stops`
    the control tokens whose names are texts of `stop`. With `skip_special_tokens` other control tokens have no text.
    `identity` is the caller's, derived by the service: callers with different identities never share cached prompts.
    Only `allowed_token_ids` may be generated, unless it is empty. The scores of the tokens in `scored_token_ids` are
    wanted at each position. `fingerprint` is what the answer shows. A default stands for a parameter that the caller
    did not set.
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
    obfuscate: bool = False
    logprobs: int | None = None
    logprobs_from: int = 0
    scored_token_ids: tuple[int, ...] = ()
    echo: bool = False
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    stop_token_ids: frozenset[int] = frozenset()
    skip_special_tokens: bool = True
    own_stop_token_ids: frozenset[int] = frozenset()
    control_stops: frozenset[int] = frozenset()
    allowed_token_ids: tuple[int, ...] = ()
    banned_texts: BannedTexts | None = None
    min_tokens: int = 0
    priority: int = 0
    return_token_ids: bool = False
    return_timings: bool = False
    fingerprint: str | None = None
    sampling: SamplingParams = SamplingParams()


@dataclass(frozen=True, slots=True)
class Token:
    """One scored token of an answer.

    `offset` is in code points from the start of the prompt. `logprob` and `top` are None for tokens of a prompt that
    are not scored, such as its first; otherwise `top` holds the likeliest tokens and this one, in descending order of
    log probability, and `by_id` the log probabilities of the request's `scored_token_ids`.
    """

    text: str
    offset: int
    logprob: float | None
    top: tuple[tuple[str, float], ...] | None
    by_id: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of a request: until its first sequence had a slot, from then until its first token, and to the last one.

    `rest` are the tokens after the first one.
    """

    queue: float
    prefill: float
    decode: float
    rest: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of one candidate's answer.

    `text` is final. `tokens` are the scores of its tokens, empty unless the request asks for them. `completion_tokens`
    and `cached_tokens` count from the candidate's start. `mean_logprob` is set in the last piece if candidates are
    ranked. `token_ids` are the ids of the tokens of `text`, if the request asks for them. In the last piece `stop` is
    the stop text or the id of the stop or end token that ended the candidate.
    """

    prompt_index: int
    candidate: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None
    completion_tokens: int
    cached_tokens: int
    mean_logprob: float | None = None
    token_ids: tuple[int, ...] = ()
    stop: str | int | None = None

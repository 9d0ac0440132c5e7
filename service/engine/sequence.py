"""One choice being generated: the only mutable state that scheduler, sampler and engine share."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from service.engine.generation import Generation
    from service.engine.sampler import Score
    from service.text.transcript import Transcript
    from service.types import Prompt, Request, Token


@dataclass(eq=False, slots=True)
class PromptGroup:
    """The candidates of one prompt, and what computing the prompt once gives to all of them.

    `logits` (shape [vocabulary]) follow the prompt's last token; None until computed, and again once no candidate
    waits for them. `unstarted` candidates do. `texts` and `scores` are the prompt's own tokens, where the request
    echoes and scores them.
    """

    prompt: Prompt
    unstarted: int
    logits: Any = None
    texts: list[tuple[str, int]] = field(default_factory=list)
    scores: list[Token] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Sequence:
    """One candidate for one prompt.

    `tokens` is the prompt and what was generated. The sequence's slot holds the keys and values of the first
    `computed` of them; `cached` of those were copied, not computed. `slot` is None while waiting and after the end.
    `counts` are the generated tokens; `unshown` scores those that the transcript still holds back. `sampled_at` is when
    the last token was sampled, in seconds of the engine's clock.
    """

    request: Request
    generation: Generation
    group: PromptGroup
    prompt_index: int
    candidate: int
    transcript: Transcript
    tokens: list[int]
    slot: int | None = None
    computed: int = 0
    cached: int = 0
    counts: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0
    logprob_sum: float = 0.0
    unshown: deque[tuple[int, Score]] = field(default_factory=deque)
    sampled_at: float | None = None
    finished: bool = False

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.group.prompt.token_ids)

    @property
    def generated(self) -> int:
        """Tokens generated so far, end token and stop text included."""
        return len(self.tokens) - self.prompt_length

    @property
    def decoding(self) -> bool:
        """Whether the next step of the model is for a generated token."""
        return self.generated > 0

    @property
    def scores_prompt(self) -> bool:
        """Whether prompt tokens are still to be scored, which needs the logits of all of them."""
        wanted = self.request.echo and self.request.logprobs is not None
        return wanted and len(self.group.scores) < self.prompt_length

    @property
    def ranked(self) -> bool:
        """Whether this candidate competes with others for a place in the answer."""
        return self.request.best_of > self.request.n

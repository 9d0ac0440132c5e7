"""A candidate while it is generated: the mutable state that scheduler, committer and engine share."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from service.engine.scores import Packed, Score, Wanted, pack
from service.text.transcript import Transcript

if TYPE_CHECKING:
    from service.engine.generation import Generation
    from service.types import Prompt, Request, Token


@dataclass(eq=False, slots=True)
class PromptGroup:
    """The candidates of one prompt, and the results of its prefill, which all of them share.

    `unstarted` candidates still wait for `logits` (shape [vocabulary]), which follow the prompt's last token: None
    before the prefill, and again once no candidate waits. `texts` and `scores` are of the prompt's tokens, if the
    request asks for an echo with log probabilities.
    """

    prompt: Prompt
    unstarted: int
    logits: Any = None
    texts: list[tuple[str, int]] = field(default_factory=list)
    scores: list[Token] = field(default_factory=list)


@dataclass(eq=False, slots=True)
class Sequence:
    """One candidate for one prompt.

    `tokens` is the prompt, then the generated tokens. The first `computed` of them are in the KV cache, in `slot`; of
    these `cached` were copied, not computed. `slot` is None while the sequence waits and after its end. `scores` are
    those that the prefix cache keeps: of each token in order, None for a token without; or None where none are kept.
    `counts` says how often each token was generated. `unshown` are tokens whose text the transcript still holds back,
    with their scores. `sampled_at` is when the last token was sampled, in seconds of the engine's clock. `written` is
    the end of the text's bytes, where texts are banned.
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
    scores: list[Packed | None] | None = None
    counts: dict[int, int] = field(default_factory=dict)
    completion_tokens: int = 0
    logprob_sum: float = 0.0
    unshown: deque[tuple[int, Score | None]] = field(default_factory=deque)
    written: bytes = b""
    sampled_at: float | None = None
    finished: bool = False

    @property
    def prompt_length(self) -> int:
        """The number of tokens in the prompt."""
        return len(self.group.prompt.token_ids)

    @property
    def positions(self) -> int:
        """The most positions of the KV cache that it can come to take."""
        return self.prompt_length + self.request.max_tokens

    @property
    def generated(self) -> int:
        """The number of tokens generated so far, with the end token and tokens of stop text."""
        return len(self.tokens) - self.prompt_length

    @property
    def decoding(self) -> bool:
        """Whether the prefill is over: the next call of the model is a decode step."""
        return self.generated > 0

    @property
    def needs_prompt_scores(self) -> bool:
        """Whether the prefill has to return the logits of every prompt token: some are not scored yet."""
        wanted = self.request.echo and self.request.logprobs is not None
        return wanted and self.first_unscored < self.prompt_length

    @property
    def first_unscored(self) -> int:
        """The index of the first prompt token that has no score yet and will have one; the first token has none."""
        return max(1, self.request.logprobs_from, len(self.group.scores))

    @property
    def wanted_scores(self) -> Wanted | None:
        """The scores of the prompt's tokens that are still wanted, if any."""
        if not self.needs_prompt_scores:
            return None
        return Wanted(self.first_unscored, self.request.logprobs or 0, bool(self.request.scored_token_ids))

    def keep_score(self, at: int, score: Score) -> None:
        """Keeps the score of token `at`, which follows all that have one, for later prompts."""
        if self.scores is not None:
            assert at >= len(self.scores)
            self.scores += [None] * (at - len(self.scores))
            self.scores.append(pack(score, self.request.logprobs or 0))

    @property
    def ranked(self) -> bool:
        """Whether this candidate competes with others for a place in the answer."""
        return self.request.best_of > self.request.n


def sequences_of(request: Request, generation: Generation) -> list[Sequence]:
    """The sequences of a request: `best_of` candidates for each prompt, which share a group."""
    sequences = []
    for prompt_index, prompt in enumerate(request.prompts):
        group = PromptGroup(prompt, unstarted=request.best_of)
        for candidate in range(request.best_of):
            transcript = Transcript(request.stop, len(prompt.text), prompt.tail, include_stop=request.include_stop)
            sequence = Sequence(request, generation, group, prompt_index, candidate, transcript, list(prompt.token_ids))
            sequence.written = prompt.tail
            sequences.append(sequence)
    return sequences

"""Callers of the simulated world: their requests, the answers they must get, and how they read and leave."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

from service.engine.commit import Committer
from service.engine.sampler import score
from service.engine.sequence import PromptGroup
from service.engine.sequence import Sequence as Candidate
from service.text.tokenizer import Tokenizer
from service.text.transcript import Transcript
from service.types import Delta, FinishReason, Prompt, Request, SamplingParams
from tests.support.fakes import ALPHABET, END, LETTERS, VOCABULARY, request

IDENTITIES = ("ann", "bob", "eve")
# Where a request can be when its caller leaves.
STATES = ("queued", "prompting", "decoding", "held back", "finishing")

# A candidate's whole text, why it ends, and the tokens that it counts.
Expected = tuple[str, FinishReason, int]


class Violation(AssertionError):  # noqa: N818, it is an assertion about the world
    """An invariant does not hold."""


def check(holds: object, what: str, *details: object) -> None:
    if not holds:
        raise Violation(f"{what}: {', '.join(map(repr, details))}" if details else what)


@dataclasses.dataclass(eq=False)
class Visit:
    """A caller with one request: what it should get, how it reads, and when it leaves (None: not).

    `curse` is the number of generated tokens (of its first candidate) at which the model fails on it: by an error, or
    by logits that are not numbers where `poisoned`. `excused` is set when a fault of the world itself has met it.
    Where the model is `exact`, scores of its prompt may come from the cache, which sets `scores_reused`.
    """

    request: Request
    expected: list[Expected]
    exact: bool = False
    scores_reused: bool = False
    leaves_after: int | None = None
    leaves_in: str | None = None
    deadline: float = float("inf")
    reads_every: int = 1
    curse: int | None = None
    poisoned: bool = False
    excused: bool = False
    pieces: int = 0
    outcome: str = ""
    error: Exception | None = None
    texts: list[str] = dataclasses.field(default_factory=list)
    finishes: list[FinishReason | None] = dataclasses.field(default_factory=list)
    generation: Any = None
    iterator: Any = None

    @property
    def restless(self) -> bool:
        """Whether it leaves before the end."""
        return self.leaves_after is not None or self.leaves_in is not None or self.deadline < float("inf")

    def take(self, delta: Delta) -> None:
        """Takes in a piece, which must go on with its text as expected."""
        made = self.request
        index = delta.prompt_index * made.best_of + delta.candidate
        check(self.finishes[index] is None, "a piece after the last one", delta)
        self.pieces += 1
        self.texts[index] += delta.text
        self.finishes[index] = delta.finish_reason
        expected = self.expected[index][0]
        check(expected.startswith(self.texts[index]), "a text goes astray", self.texts[index], expected)
        if made.logprobs is not None:
            check("".join(token.text for token in delta.tokens) == delta.text, "scores without their text", delta)
            if made.sampling.greedy:  # then the text is of letters only
                self._check_scores(delta, made.logprobs)
        if delta.finish_reason is not None:
            tokens = self.expected[index][2]
            check(delta.completion_tokens == tokens, "tokens miscounted", delta.completion_tokens, tokens)
            check((delta.mean_logprob is not None) == (made.best_of > made.n), "ranked or not", delta)

    def _check_scores(self, delta: Delta, count: int) -> None:
        """Each token is scored by the letter before it, however often that was computed."""
        made, index = self.request, delta.prompt_index * self.request.best_of + delta.candidate
        text = ("" if made.echo else made.prompts[delta.prompt_index].text) + self.texts[index]
        for token in delta.tokens:
            if not token.offset:
                check(token.logprob is None, "the first token is scored", token)
                continue
            wanted = score(ALPHABET[LETTERS.index(text[token.offset - 1])], LETTERS.index(token.text), count)
            top = {LETTERS[other]: logprob for other, logprob in wanted.top}
            check((token.logprob, dict(token.top or ())) == (wanted.logprob, top), "a score of another token", token)
        if made.echo and delta.candidate == 0 and delta.cached_tokens:
            check(self.exact, "scores were reused that have other bits than a prefill's", delta)
            self.scores_reused = True

    def check_end(self) -> None:
        """Nothing came after the end that the caller saw."""
        if self.outcome == "finished" or self.error is not None:
            check(not self.generation.unread, "pieces after the end", self.outcome)
            check(self.generation.error is self.error, "two ends", self.outcome, self.generation.error)


def random_request(draw: random.Random) -> Request:
    """Most are plain; some have candidates, batches, stops, echoes, scores, or are drawn at random."""
    count = 1 if draw.random() < 0.9 else 2
    prompts = [_prompt(draw) for _ in range(count)]
    n = 1 if draw.random() < 0.85 else draw.randrange(2, 4)
    changes: dict[str, Any] = {"n": n, "best_of": n, "identity": draw.choice((*IDENTITIES, IDENTITIES[0]))}
    changes["max_tokens"] = 0 if draw.random() < 0.02 else draw.randrange(1, 24)
    if draw.random() < 0.1:
        changes["best_of"] = n + 1
    if draw.random() < 0.3:
        start, length = draw.randrange(26), draw.randrange(1, 5)
        changes["stop"] = tuple((LETTERS * 2)[start + i : start + i + length] for i in range(draw.randrange(1, 3)))
    if draw.random() < 0.15:
        changes["stop_token_ids"] = frozenset({END, draw.randrange(26)})
        changes["min_tokens"] = draw.choice((0, 0, 3))
    if draw.random() < 0.2:
        changes["echo"] = True
    if draw.random() < (0.5 if "echo" in changes else 0.1):
        changes["logprobs"] = draw.randrange(3)
    if draw.random() < 0.06:
        changes["sampling"] = SamplingParams(temperature=draw.choice((0.5, 2.0)), seed=draw.randrange(9))
    return request(*prompts, **changes)


def _prompt(draw: random.Random) -> Prompt:
    """The letters from somewhere on: many share a beginning, so that the cache has something to reuse."""
    start, length = draw.choice((0, 0, 0, 7, 13)), draw.choice((1, 2, 3, 17, 18, 20, 33, 40))
    text = (LETTERS * 3)[start : start + length]
    if draw.random() < 0.3:
        text = text[:-1] + draw.choice(LETTERS)
    return Prompt(tuple(map(LETTERS.index, text)), text)


def expected(made: Request, tokenizer: Tokenizer) -> list[Expected]:
    """The answer of each candidate: computed by hand for greedy requests, else by the committer."""
    found = []
    for at, prompt in enumerate(made.prompts):
        for candidate in range(made.best_of):
            if made.sampling.greedy:
                text, finish, tokens = by_hand(made, prompt)
            else:
                text, finish, tokens = _alone(made, prompt, at, candidate, tokenizer)
            found.append(((prompt.text if made.echo else "") + text, finish, tokens))
    return found


def by_hand(made: Request, prompt: Prompt) -> Expected:
    """The alphabet from the prompt's last letter on, up to the first stop or `max_tokens` letters."""
    last, text = prompt.token_ids[-1], ""
    for generated in range(made.max_tokens):
        banned = made.stop_token_ids if generated < made.min_tokens else ()
        likely = ((last + 1) % len(LETTERS), (last + 2) % len(LETTERS), *range(VOCABULARY))
        last = next(token for token in likely if token not in banned)
        if last in made.stop_token_ids:
            return text, FinishReason.STOP, len(text)
        text += LETTERS[last]
        stops = [stop for stop in made.stop if text.endswith(stop)]
        if stops:
            text = text[: -max(map(len, stops))]
            return text, FinishReason.STOP, len(text)
    return text, FinishReason.LENGTH, len(text)


def _alone(made: Request, prompt: Prompt, at: int, candidate: int, tokenizer: Tokenizer) -> Expected:
    """The committer's answer for the same logits, without scheduler, slots or other requests."""
    committer = Committer(tokenizer)
    transcript = Transcript(made.stop, len(prompt.text), prompt.tail)
    no_generation: Any = None
    one = Candidate(made, no_generation, PromptGroup(prompt, 1), at, candidate, transcript, list(prompt.token_ids))
    text, finish = "", None if made.max_tokens else FinishReason.LENGTH
    while finish is None:
        delta = committer.advance(one, ALPHABET[one.tokens[-1]])
        if delta is not None:
            text, finish = text + delta.text, delta.finish_reason
    return text, finish, one.completion_tokens

"""From logits to text: samples a sequence's next token and turns it into a piece of the answer."""

from __future__ import annotations

from collections.abc import Sequence as Seq

import numpy as np

from service.engine import sampler
from service.engine.sampler import Floats, Ids, Row
from service.engine.scores import Score, unpack
from service.engine.sequence import Sequence
from service.errors import NotFiniteError
from service.text.tokenizer import Tokenizer
from service.text.transcript import Piece, Transcript
from service.types import Delta, FinishReason, Prompt, Token


class Committer:
    """Advances sequences by the model's logits. It knows sampling and text, but no slots and no threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def score_prompt(self, sequence: Sequence, logits: Floats | Seq[Row], first: int) -> None:
        """Scores the prompt's next tokens; rows of the logits are for consecutive prompt tokens from `first` on."""
        group, request = sequence.group, sequence.request
        ids = group.prompt.token_ids
        self._begin_scores(sequence)
        for row in logits[len(group.scores) - first : len(ids) - first]:
            _check_finite(row)
            at = len(group.scores)
            score = sampler.score(row, ids[at], request.logprobs or 0, request.scored_token_ids)
            sequence.keep_score(at, score)
            group.scores.append(self._token(*group.texts[at], ids[at], score))

    def _begin_scores(self, sequence: Sequence) -> None:
        """Adds the prompt tokens that get no score, and those whose scores the cache had, if that was not done yet."""
        group, kept, first = sequence.group, sequence.scores or [], sequence.first_unscored
        if not group.scores:
            group.texts = self._texts(group.prompt)
            group.scores += [Token(*text, logprob=None, top=None) for text in group.texts[:first]]
            rest = zip(group.texts[first:], group.prompt.token_ids[first:], kept[first:], strict=False)
            for text, token, packed in rest:
                assert packed is not None
                group.scores.append(self._token(*text, token, unpack(packed, token, sequence.request.logprobs or 0)))

    def _texts(self, prompt: Prompt) -> list[tuple[str, int]]:
        """The prompt's tokens as (text, offset)."""
        transcript = Transcript()
        pieces = [transcript.push(token) for token in self._tokenizer.text_bytes(prompt.token_ids, prompt.implied)]
        return [token for piece in [*pieces, transcript.finish()] for token in piece.tokens]

    def begin(self, sequence: Sequence) -> Delta | None:
        """The first piece, before any token: the echo, and the end when `max_tokens` is 0; None if neither."""
        request = sequence.request
        finish = None if request.max_tokens else FinishReason.LENGTH
        if not request.echo and finish is None:
            return None
        text = sequence.group.prompt.text if request.echo else ""
        tokens: tuple[Token, ...] = ()
        if request.echo and request.logprobs is not None:
            self._begin_scores(sequence)
            tokens = tuple(sequence.group.scores)
        return self._delta(sequence, text, tokens, finish)

    def advance(self, sequence: Sequence, logits: Row) -> Delta | None:
        """Samples the next token from a row of logits, and returns the text that this made final, if any.

        Raises NotFiniteError when the logits are not finite.
        """
        request = sequence.request
        token = self._sample(sequence, logits)
        if token is None:
            return self._show(sequence, sequence.transcript.finish(), FinishReason.STOP)
        scored = request.logprobs is not None or sequence.ranked
        score = sampler.score(logits, token, request.logprobs or 0, request.scored_token_ids) if scored else None
        if score is not None:
            sequence.keep_score(len(sequence.tokens), score)
        sequence.tokens.append(token)
        sequence.logprob_sum += score.logprob if score else 0.0
        if token in request.stop_token_ids and token not in request.control_stops:
            return self._show(sequence, sequence.transcript.finish(), FinishReason.STOP, token)
        sequence.counts[token] = sequence.counts.get(token, 0) + 1
        if request.logprobs is not None or request.return_token_ids:
            sequence.unshown.append((token, score))
        skip_special = request.skip_special_tokens and token not in request.control_stops
        added = self._tokenizer.token_bytes(token, skip_special=skip_special)
        if request.banned_texts is not None:
            sequence.written = (sequence.written + added)[-request.banned_texts.reach :]
        piece = sequence.transcript.push(added)
        if piece.stopped:
            return self._show(sequence, piece, FinishReason.STOP, sequence.transcript.stop_text)
        if sequence.generated < request.max_tokens:
            return self._show(sequence, piece, None) if piece.tokens else None
        rest = sequence.transcript.finish()
        last = Piece(piece.text + rest.text, piece.tokens + rest.tokens)
        return self._show(sequence, last, FinishReason.LENGTH)

    @staticmethod
    def _sample(sequence: Sequence, logits: Row) -> int | None:
        """The next token; None if the request allows none."""
        request, params = sequence.request, sequence.request.sampling
        banned: Seq[int] | Ids = tuple(request.stop_token_ids) if sequence.generated < request.min_tokens else ()
        if request.banned_texts is not None:
            banned = np.concatenate([np.array(banned, np.int64), request.banned_texts.completing(sequence.written)])
        _check_finite(logits)
        allowed = request.allowed_token_ids
        prompt = sequence.group.prompt.token_ids
        processed = sampler.process(logits, params, prompt, sequence.counts, banned, allowed=allowed)
        if (len(banned) or allowed) and not sampler.is_finite(processed):
            return None
        stream = sequence.prompt_index * request.best_of + sequence.candidate
        u = 0.0 if params.greedy else sampler.uniform(params.seed, stream, sequence.generated)
        return sampler.choose(processed, params, u)

    def _show(
        self, sequence: Sequence, piece: Piece, finish: FinishReason | None, stop: str | int | None = None
    ) -> Delta:
        request = sequence.request
        sequence.completion_tokens += len(piece.tokens)
        tokens: list[Token] = []
        ids: list[int] = []
        if request.logprobs is not None or request.return_token_ids:
            for text, offset in piece.tokens:
                index, score = sequence.unshown.popleft()
                ids.append(index)
                if score is not None and request.logprobs is not None:
                    tokens.append(self._token(text, offset, index, score))
        shown_ids = tuple(ids) if request.return_token_ids else ()
        return self._delta(sequence, piece.text, tuple(tokens), finish, token_ids=shown_ids, stop=stop)

    def _token(self, text: str, offset: int, index: int, score: Score) -> Token:
        """A scored token, shown as `text`. Of alternatives with equal text one stays: the token, or the likeliest."""
        top = {text or self._name(index): score.logprob}
        for other, logprob in score.top:
            if other != index:
                top.setdefault(self._name(other), logprob)
        return Token(text, offset, score.logprob, tuple(sorted(top.items(), key=lambda item: -item[1])), score.others)

    def _name(self, index: int) -> str:
        """The text of a token among others, or its id: never empty, because an empty key ends Envoy."""
        return self._tokenizer.token_text(index) or f"token_id:{index}"

    @staticmethod
    def _delta(
        sequence: Sequence,
        text: str,
        tokens: tuple[Token, ...],
        finish: FinishReason | None,
        *,
        token_ids: tuple[int, ...] = (),
        stop: str | int | None = None,
    ) -> Delta:
        mean = None
        if finish is not None and sequence.ranked:
            mean = sequence.logprob_sum / max(1, sequence.generated)
        return Delta(
            prompt_index=sequence.prompt_index,
            candidate=sequence.candidate,
            text=text,
            tokens=tokens,
            finish_reason=finish,
            completion_tokens=sequence.completion_tokens,
            cached_tokens=sequence.cached,
            mean_logprob=mean,
            token_ids=token_ids,
            stop=stop,
        )


def _check_finite(logits: Row) -> None:
    """Raises NotFiniteError if a logit is NaN or plus infinity, or all are minus infinity: the row is unusable."""
    if not sampler.is_finite(logits):
        raise NotFiniteError("the model's logits are not finite")

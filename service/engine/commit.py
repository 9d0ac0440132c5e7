"""From logits to text: samples a sequence's next token and turns it into a piece of the answer."""

from __future__ import annotations

from collections.abc import Sequence as Seq

from service.engine import sampler
from service.engine.sampler import Floats, Row, Score
from service.engine.sequence import Sequence
from service.errors import NotFiniteError
from service.text.tokenizer import Tokenizer
from service.text.transcript import Piece, Transcript
from service.types import Delta, FinishReason, Prompt, Token


class Committer:
    """Advances sequences by the model's logits. It knows sampling and text, but no slots and no threads."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def score_prompt(self, sequence: Sequence, logits: Floats | Seq[Row]) -> None:
        """Scores the prompt's next tokens; row i of the logits follows the i-th of consecutive prompt tokens."""
        group, count = sequence.group, sequence.request.logprobs or 0
        ids = group.prompt.token_ids
        if not group.scores:
            group.texts = self._texts(group.prompt)
            group.scores.append(Token(*group.texts[0], logprob=None, top=None))
        for row in logits[: len(ids) - len(group.scores)]:
            _check_finite(row)
            at = len(group.scores)
            group.scores.append(self._token(*group.texts[at], ids[at], sampler.score(row, ids[at], count)))

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
        tokens = tuple(sequence.group.scores) if request.echo and request.logprobs is not None else ()
        return self._delta(sequence, text, tokens, finish)

    def advance(self, sequence: Sequence, logits: Row) -> Delta | None:
        """Samples the next token from a row of logits, and returns the text that this made final, if any.

        Raises NotFiniteError when the logits are not finite.
        """
        request = sequence.request
        token = self._sample(sequence, logits)
        scored = request.logprobs is not None or sequence.ranked
        score = sampler.score(logits, token, request.logprobs or 0) if scored else None
        sequence.tokens.append(token)
        sequence.logprob_sum += score.logprob if score else 0.0
        if token in request.stop_token_ids:
            return self._show(sequence, sequence.transcript.finish(), FinishReason.STOP)
        sequence.counts[token] = sequence.counts.get(token, 0) + 1
        if score is not None and request.logprobs is not None:
            sequence.unshown.append((token, score))
        shown = self._tokenizer.token_bytes(token, skip_special=request.skip_special_tokens)
        piece = sequence.transcript.push(shown)
        if piece.stopped:
            return self._show(sequence, piece, FinishReason.STOP)
        if sequence.generated < request.max_tokens:
            return self._show(sequence, piece, None) if piece.tokens else None
        rest = sequence.transcript.finish()
        last = Piece(piece.text + rest.text, piece.tokens + rest.tokens)
        return self._show(sequence, last, FinishReason.LENGTH)

    @staticmethod
    def _sample(sequence: Sequence, logits: Row) -> int:
        request, params = sequence.request, sequence.request.sampling
        banned = tuple(request.stop_token_ids) if sequence.generated < request.min_tokens else ()
        _check_finite(logits)
        processed = sampler.process(logits, params, sequence.group.prompt.token_ids, sequence.counts, banned)
        stream = sequence.prompt_index * request.best_of + sequence.candidate
        u = 0.0 if params.greedy else sampler.uniform(params.seed, stream, sequence.generated)
        return sampler.choose(processed, params, u)

    def _show(self, sequence: Sequence, piece: Piece, finish: FinishReason | None) -> Delta:
        sequence.completion_tokens += len(piece.tokens)
        tokens: tuple[Token, ...] = ()
        if sequence.request.logprobs is not None:
            tokens = tuple(self._token(*shown, *sequence.unshown.popleft()) for shown in piece.tokens)
        return self._delta(sequence, piece.text, tokens, finish)

    def _token(self, text: str, offset: int, index: int, score: Score) -> Token:
        """A scored token, shown as `text`. Of alternatives with equal text one stays: the token, or the likeliest."""
        top = {text: score.logprob}
        for other, logprob in score.top:
            if other != index:
                top.setdefault(self._tokenizer.token_text(other), logprob)
        return Token(text, offset, score.logprob, tuple(sorted(top.items(), key=lambda item: -item[1])))

    @staticmethod
    def _delta(sequence: Sequence, text: str, tokens: tuple[Token, ...], finish: FinishReason | None) -> Delta:
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
        )


def _check_finite(logits: Row) -> None:
    """Raises NotFiniteError if a logit is NaN or plus infinity, or all are minus infinity: the row is unusable."""
    if not sampler.is_finite(logits):
        raise NotFiniteError("the model's logits are not finite")

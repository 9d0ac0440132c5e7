"""What a request took: counts and times for observers, and times for the caller who asks for them."""

from __future__ import annotations

from completion.v1 import completion_pb2 as pb

from service.engine.generation import Generation
from service.telemetry.observer import Usage
from service.types import FinishReason, Request


def usage_of(request: Request, model: str, generation: Generation, began: float) -> Usage:
    """The parameters, counts and times of a request that has ended; its call began at `began`."""
    started, first = generation.started_at, generation.first_piece_at
    return Usage(
        id=request.id,
        model=model,
        max_tokens=request.max_tokens,
        temperature=request.sampling.temperature,
        top_p=request.sampling.top_p,
        n=request.n,
        sequences=len(request.prompts) * request.best_of,
        prompt_tokens=sum(len(prompt.token_ids) for prompt in request.prompts),
        cached_tokens=generation.cached_tokens,
        completion_tokens=generation.completion_tokens,
        longest=generation.longest,
        stopped=generation.finished[FinishReason.STOP],
        cut_off=generation.finished[FinishReason.LENGTH],
        queued_seconds=generation.queued_at - began,
        started_seconds=None if started is None else started - began,
        first_token_seconds=None if first is None else first - began,
    )


def timings_of(request: Request, generation: Generation) -> pb.Timings | None:
    """How long a request waited and was computed, to the microsecond, if it asks for that and has ended."""
    if not (request.return_timings and generation.ended):
        return None
    times = generation.times
    return pb.Timings(
        queue_seconds=round(times.queue, 6),
        prefill_seconds=round(times.prefill, 6),
        decode_seconds=round(times.decode, 6),
        tokens_per_second=round(times.rest / times.decode, 3) if times.decode > 0 else 0.0,
    )


def timing_metadata(timings: pb.Timings | None) -> tuple[tuple[str, str], ...]:
    """The same as trailing metadata."""
    if timings is None:
        return ()
    names = [field.name for field in pb.Timings.DESCRIPTOR.fields]
    return tuple((f"x-{name.replace('_', '-')}", f"{getattr(timings, name):.6f}") for name in names)

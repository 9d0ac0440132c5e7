"""What the exporter measured of a model against its source; a part of the manifest."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict, Field


class Record(BaseModel):
    """A part of the manifest: read strictly, with no other keys than its own."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class Measures(Record):
    """Size, perplexity and speed of one model, measured on the exporter's text and machine.

    `bytes` is the size of the files. Speeds are in tokens per second: `read_per_second` for prefill,
    `generated_per_second` for decode, None where it was not measured. The source model is measured with plain float32
    arithmetic over its weights.
    """

    bytes: int = Field(ge=0)
    perplexity: float
    read_per_second: float
    generated_per_second: float | None


class Quality(Record):
    """What the exporter measured against the source weights, over `tokens` tokens of text.

    Kullback-Leibler divergences are in nats per token: `kl` of prefilled tokens, `decode_kl` of tokens decoded one by
    one. Errors are differences of logits, of prefilled tokens.
    """

    kl: float
    max_logit_error: float
    tokens: int = Field(ge=1)
    decode_kl: float
    mean_logit_error: float
    source: Measures
    export: Measures

"""What a family of models is to its proof: one entry of a list."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tests.families.vocabularies import VOCAB

WINDOW = 24

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB,
    "max_position_embeddings": 256,
}


@dataclass(frozen=True)
class Family:
    """A model that transformers makes of `config`, which names its `model_type`, on top of SIZES unless `sizes` differ.

    `tokenizer` is one of `vocabularies.KINDS`; with `add_bos` its texts begin with a token of their own. `tolerance` is
    the largest difference of a log probability, in nats.
    """

    name: str
    config: Mapping[str, Any]
    tokenizer: str = "byte-level"
    add_bos: bool = False
    tolerance: float = 1e-3
    sizes: Mapping[str, Any] = field(default_factory=lambda: SIZES)

    def __str__(self) -> str:
        return self.name

    @property
    def settings(self) -> dict[str, Any]:
        """The whole configuration."""
        return {**self.sizes, **self.config}
